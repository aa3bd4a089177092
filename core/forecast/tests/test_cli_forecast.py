import json
import re
import subprocess
import sys

import pytest
from eke.__main__ import main
from eke.forecast.cli import human, size

BUILD = """
import torch
from eke.testing.models import TinyBlocks

def build():
    data = TinyBlocks.dataset(2)
    return TinyBlocks(), [torch.stack([data[i][part] for i in range(2)]) for part in (0, 1)]
"""


@pytest.fixture
def target(tmp_path):
    file = tmp_path / "train_small.py"
    file.write_text(BUILD)
    return f"{file}:build"


def test_it_prints_the_peak_by_cause(target, capsys):
    assert main(["forecast", target]) == 0
    printed = capsys.readouterr().out
    for word in ("parameters", "gradients", "optimizer", "activations", "temporary", "total", "peak of a step"):
        assert word in printed
    assert "10,112 parameters, of which 10,112 train." in printed


@pytest.mark.parametrize("flag", ["--gpu-memory", "--card"])
def test_memory_that_is_large_enough_gets_its_largest_batch(target, capsys, flag):
    assert main(["forecast", target, flag, "1MiB"]) == 0
    assert "Into 1.00 MiB of GPU memory it fits, with" in capsys.readouterr().out


def test_memory_that_is_too_small_gets_the_first_change_and_a_picture(target, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "bars.png"
    assert main(["forecast", target, "--gpu-memory", "220KiB", "--ranks", "4", "--png", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "it does not fit" in printed
    assert "The first change that makes it fit, in the order of cost:" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_memory_that_nothing_fits_is_code_1(target, capsys):
    assert main(["forecast", target, "--gpu-memory", "1 KB"]) == 1
    assert "Nothing that was tried makes it fit; the least is" in capsys.readouterr().out


def test_words_of_a_recipe_and_options_of_the_trainer_apply(target, capsys):
    main(["forecast", target, "--precision", "bf16-true", "--batch", "1", "--accumulate", "2"])
    assert "20.22 KiB" not in capsys.readouterr().err
    if (
        "adam8bit"
        in subprocess.run([sys.executable, "-m", "eke", "list"], capture_output=True, text=True, check=True).stdout
    ):
        assert main(["forecast", target, "adam8bit"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.py:build"], "there is no file nowhere.py"),
        (["eke:nothing"], "eke has no function 'nothing'"),
        (["build"], "'build' names no function"),
        (["json:dumps", "--ranks", "0"], "--ranks 0: 1 or more is needed"),
        (["json:dumps", "not_a_technique"], "no technique named 'not_a_technique'"),
        (["not_a_module:x"], "not_a_module does not load: ModuleNotFoundError"),
    ],
)
def test_what_is_of_no_use_is_one_line_and_code_2(words, message, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)  # processes that share the tests have it
    assert main(["forecast", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_sizes_are_read_and_written():
    assert size("80GiB") == 80 * 2**30
    assert size("24 GB") == 24 * 10**9
    assert size("16G") == 16 * 2**30
    assert size("512") == 512
    assert human(3 * 2**30) == "3.00 GiB"
    with pytest.raises(Exception, match="is no size"):
        size("much")
    assert json.dumps(size("1.5KiB")) == "1536"


def test_help_of_the_other_commands_imports_no_torch():
    lines = ("import sys", "from eke.__main__ import main", "main(['list'])", "assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, capture_output=True)


@pytest.mark.parametrize("loader", ["DataLoader(data, 2)", "DataLoader(data, 2, shuffle=True, num_workers=2)"])
def test_the_batch_may_come_from_a_loader(tmp_path, capsys, loader):
    file = tmp_path / "train_loader.py"
    file.write_text(
        "from eke.testing.models import TinyBlocks\nfrom torch.utils.data import DataLoader\n"
        f"def build():\n    data = TinyBlocks.dataset(4)\n    return TinyBlocks(), {loader}\n"
    )
    assert main(["forecast", f"{file}:build", "--card", "1MiB"]) == 0
    assert "10,112 parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("model", "build() returned a TinyBlocks. A forecast needs two things, (model, batch)"),
        ("3, 4", "build() returned (int, int). A forecast needs two things"),
        ("model, 1, 2", "build() returned (TinyBlocks, int, int)"),
        ("model, 4", "the batch is of type int. Return a batch of tensors"),
        ("model, []", "the list gives no batch"),
    ],
)
def test_what_is_no_model_and_batch_is_a_sentence(tmp_path, capsys, given, found):
    file = tmp_path / "train_wrong.py"
    file.write_text(
        "from eke.testing.models import TinyBlocks\nmodel = None\n"
        f"def build():\n    model = TinyBlocks()\n    return {given}\n"
    )
    assert main(["forecast", f"{file}:build"]) == 2
    assert found in capsys.readouterr().err


def test_the_largest_batch_is_found_where_it_has_many_thousand_samples(target, capsys):
    assert main(["forecast", target, "--card", "1GiB"]) == 0
    found = re.search(r"The largest batch that fits has (\d+) samples", capsys.readouterr().out)
    assert int(found[1]) > 10_000
