import importlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from eke import registry
from eke.__main__ import main

CORE = Path(__file__).parents[1]

CLASS = '''
from lightning.pytorch import Callback
from {package}.entry import RECORD


class Thing(Callback):
    """A thing.

    Args:
        every: Batches between two
            counts, 1 or more.
        where: Path.

    Raises:
        ValueError: every is below 1.
    """

    technique = RECORD

    def __init__(self, every: int = 1, where: str = "") -> None:
        if every < 1:
            raise ValueError(f"every={{every}} counts nothing: give 1 or more.")
        self.every = every
'''

ENTRY = """
import eke

RECORD = eke.Technique({name!r}, "callback", "{package}.callback:Thing", **{fields!r})


@eke.hookimpl
def eke_technique():
    return RECORD
"""

CERTIFICATE = {
    "date": "2026-11-24",
    "versions": {"torch": "2.13.0+cpu", "lightning": "2.6.6"},
    "strategies": ["single device", "ddp"],
    "precisions": ["32-true", "bf16-mixed"],
}


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on the path for distributions."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name, plugin in registry._manager.list_name_plugin():
        if str(folder) in (getattr(plugin, "__file__", None) or ""):
            registry._manager.unregister(name=name)
    for module in [
        name for name, module in sys.modules.items() if str(folder) in (getattr(module, "__file__", 0) or "")
    ]:
        del sys.modules[module]


def install(site, name, distribution=None, certificate=None, **fields):
    distribution = distribution or f"eke-{name}"
    package = distribution.replace("-", "_")
    info = site / f"{package}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.4\nName: {distribution}\nVersion: 1.2\nSummary: Does {name}\nKeywords: eke,callback\n"
    )
    (info / "entry_points.txt").write_text(f"[eke]\n{name} = {package}.entry\n")
    home = site / package
    home.mkdir()
    (home / "__init__.py").write_text(f"from {package}.callback import Thing\n")
    (home / "callback.py").write_text(CLASS.format(package=package))
    (home / "entry.py").write_text(ENTRY.format(name=name, package=package, fields=fields))
    if certificate is not None:
        (home / "certificate.json").write_text(certificate if isinstance(certificate, str) else json.dumps(certificate))
    importlib.invalidate_caches()
    return home


def run(capsys, *words):
    code = main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def line_of(out, name):
    (line,) = [line for line in out.splitlines() if line.split()[0] == name]
    return " ".join(line.split())


# eke list


def test_a_technique_is_listed_with_version_kind_summary_and_certificate(site, capsys):
    install(site, "shrink", certificate=CERTIFICATE)
    install(site, "grow")
    code, out, _ = run(capsys, "list")
    assert code == 0
    assert line_of(out, "shrink") == (
        "shrink 1.2 callback Does shrink passed 2026-11, torch 2.13.0, lightning 2.6.6: "
        "single device, ddp; 32-true, bf16-mixed"
    )
    assert line_of(out, "grow") == "grow 1.2 callback Does grow none"


def test_what_is_broken_or_twofold_is_shown_as_such_and_hurts_no_other(site, capsys):
    install(site, "good")
    install(site, "same", "eke-same")
    install(site, "same", "other-same")
    (install(site, "halved") / "entry.py").unlink()
    (install(site, "gone") / "__init__.py").rename(site / "nowhere")
    (site / "eke_gone" / "entry.py").unlink()
    install(site, "unread", certificate="{")
    (site / "eke_unread-1.2.dist-info" / "METADATA").unlink()
    code, out, _ = run(capsys, "list")
    assert code == 0
    assert line_of(out, "good") == "good 1.2 callback Does good none"
    assert line_of(out, "same") == "same DUPLICATE: eke-same and other-same both provide it; uninstall one of them"
    assert line_of(out, "halved").startswith("halved 1.2 callback BROKEN: its module eke_halved.entry is not there;")
    assert line_of(out, "gone").startswith("gone 1.2 callback BROKEN: its module eke_gone.entry is not there;")
    assert line_of(out, "unread") == "unread unreadable"


def test_nothing_installed_is_said_with_a_way_on(capsys, monkeypatch):
    monkeypatch.setattr(registry, "installed", dict)
    assert run(capsys, "list")[1] == "No technique is installed. Perhaps: pip install eke-stacking\n"


def test_listing_imports_neither_torch_nor_lightning_nor_a_technique(site):
    install(site, "shrink", certificate=CERTIFICATE)
    code = (
        "import sys; from eke.__main__ import main; main(['list']); "
        "sys.exit(str(sorted({'torch', 'lightning', 'eke_shrink', 'yaml', 'cookiecutter'} & sys.modules.keys())))"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stderr == "[]\n"
    assert "shrink" in done.stdout


# eke info


def test_info_tells_the_record_the_arguments_the_exceptions_and_the_certificate(site, capsys):
    install(
        site,
        "shrink",
        certificate=CERTIFICATE,
        paper="https://arxiv.org/abs/0000.00000",
        effects=("changes batch content", "reads loss"),
        needs=("one optimizer",),
        conflicts={"grow": "one undoes the other."},
        exactness="approximate",
        exceptions={"test_two_processes_equal_one": "Each process counts for itself."},
    )
    code, out, _ = run(capsys, "info", "shrink")
    assert code == 0
    flat = [" ".join(line.split()) for line in out.splitlines()]
    assert flat == [
        "shrink 1.2 (eke-shrink): Does shrink",
        "",
        "class eke_shrink.callback.Thing",
        "kind callback",
        "paper https://arxiv.org/abs/0000.00000",
        "survey none",
        "effects changes batch content, reads loss",
        "needs one optimizer",
        "conflicts grow: one undoes the other.",
        "after none",
        "exactness approximate",
        "",
        "Arguments",
        "every=1 Batches between two counts, 1 or more.",
        "where='' Path.",
        "",
        "Contract, with these exceptions",
        "test_two_processes_equal_one Each process counts for itself.",
        "",
        "Certificate",
        "date 2026-11-24",
        "versions torch 2.13.0+cpu, lightning 2.6.6",
        "strategies single device, ddp",
        "precisions 32-true, bf16-mixed",
    ]


def test_info_of_a_technique_that_is_not_there_is_one_line_and_code_2(capsys):
    code, out, err = run(capsys, "info", "no_such")
    assert (code, out) == (2, "")
    assert err.startswith("eke: no technique named 'no_such' is installed.")
    assert err.count("\n") == 1


# eke check


def test_words_are_put_into_the_order_in_which_they_act(site, capsys):
    install(site, "reader", effects=("reads weights",), needs=("one optimizer",))
    install(site, "writer", effects=("changes weights",))
    code, out, _ = run(capsys, "check", "reader:every=2", "writer")
    assert code == 0
    assert [" ".join(line.split()) for line in out.splitlines()] == [
        "In the order in which they act:",
        "1. writer changes weights",
        "2. reader reads weights",
        "needs one optimizer",
        "They go together.",
    ]


def test_every_reason_to_refuse_is_named_and_the_code_is_1(site, capsys):
    install(site, "one", effects=("replaces weights",), conflicts={"two": "both count."})
    install(site, "two", effects=("replaces weights",))
    code, out, _ = run(capsys, "check", "one:every=0", "two:size=3")
    assert code == 1
    assert [line for line in out.splitlines() if line.startswith("REFUSED")] == [
        "REFUSED: one: every=0 counts nothing: give 1 or more.",
        "REFUSED: two: got an unexpected keyword argument 'size'. It takes: every=1, where=''.",
        "REFUSED: 'one' and 'two' both replace the weights. Leave one of them out.",
        "REFUSED: 'one' cannot run together with 'two': both count.",
    ]


def test_a_circle_is_refused_once(site, capsys):
    install(site, "one", effects=("changes weights", "reads loss"))
    install(site, "two", effects=("changes loss", "reads weights"))
    code, out, _ = run(capsys, "check", "one", "two")
    assert code == 1
    assert out.count("REFUSED: one, two each have to act before another one of them.") == out.count("REFUSED") == 1


def test_a_recipe_file_is_checked_like_words(site, tmp_path, capsys):
    install(site, "one")
    file = tmp_path / "recipe.yaml"
    file.write_text("one: {every: 2}\n")
    assert run(capsys, "check", str(file)) == (0, "In the order in which they act:\n  1. one  touches nothing\nNothing "
        "speaks against it.\n", "")  # fmt: skip
    file.write_text("one: {every: 0}\n")
    code, out, _ = run(capsys, "check", str(file))
    assert code == 1
    assert "REFUSED: one: every=0 counts nothing: give 1 or more." in out


@pytest.mark.parametrize("under", ["", "fit:\n"])
def test_a_lightning_cli_file_is_checked_by_the_records_of_its_classes(site, tmp_path, capsys, under):
    install(site, "reader", effects=("reads weights",))
    install(site, "writer", effects=("changes weights",))
    text = """
trainer:
  strategy: ddp
  plugins: {class_path: lightning.pytorch.plugins.MixedPrecision, init_args: {precision: bf16-mixed, device: cpu}}
  callbacks:
    - class_path: eke_reader.Thing
      init_args: {every: 0}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
    - class_path: eke_writer.Thing
      init_args: {every: 2}
model: {class_path: not.looked.At}
"""
    file = tmp_path / "cli.yaml"
    file.write_text(under + text.replace("\n", "\n  ") if under else text)
    code, out, _ = run(capsys, "check", str(file))
    assert code == 1
    assert "REFUSED: reader: every=0 counts nothing: give 1 or more." in " ".join(out.split())
    assert out.count("REFUSED") == 1
    assert out.index("1. writer") < out.index("2. reader")
    unknown = [line.partition(": ")[2] for line in out.splitlines() if line.startswith("Not of Eke")]
    assert unknown == [
        "lightning.pytorch.callbacks.ModelCheckpoint (callbacks)",
        "lightning.pytorch.plugins.MixedPrecision (plugins)",
        "ddp (strategy)",
    ]


def test_a_file_without_techniques_says_so(tmp_path, capsys):
    file = tmp_path / "cli.yaml"
    file.write_text("trainer: {max_epochs: 3, strategy: auto}\n")
    assert run(capsys, "check", str(file)) == (0, "No technique of Eke is asked for.\n", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "trainer: {callbacks: [{class_path: eke_no.Such}]}",
            "class_path 'eke_no.Such' does not load: No module named",
        ),
        ("trainer: {callbacks: [{path: x}]}", "trainer.callbacks holds {'path': 'x'}; a class_path is needed."),
        ("- 1", "holds [1]; a mapping of technique to its arguments is needed."),
        ("no_such: {}", "no technique named 'no_such' is installed."),
    ],
)
def test_a_file_of_no_use_is_one_line_and_code_2(tmp_path, capsys, text, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    code, out, err = run(capsys, "check", str(file))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


# eke new


def test_a_baked_technique_is_written_without_questions(tmp_path, capsys):
    pytest.importorskip("cookiecutter")
    code, out, _ = run(
        capsys, "new", "technique", "--no-input", "--output", str(tmp_path), "--set", "technique=warm-up", "kind=plugin"
    )
    assert code == 0
    assert out == f"Wrote {tmp_path / 'eke-warm-up'}. Its README.md says what to do next.\n"
    assert (tmp_path / "eke-warm-up/src/eke_warm_up/plugin.py").exists()
    assert not list(tmp_path.rglob("__pycache__"))


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (["flavour=sweet"], "--set flavour=sweet: the template has no 'flavour'. It asks for: technique, "),
        (["technique"], "--set technique: write key=value."),
        (["technique=TokenDrop"], "the template refused an answer, for the reason above. Nothing was written."),
        (
            ["kind=hook"],
            "hook provided for choice variable kind, but the choices are ['callback', 'plugin', 'strategy']",
        ),
    ],
)
def test_an_answer_that_the_template_refuses_is_one_line_and_writes_nothing(tmp_path, capsys, answers, message):
    pytest.importorskip("cookiecutter")
    code, _, err = run(capsys, "new", "technique", "--no-input", "--output", str(tmp_path), "--set", *answers)
    assert code == 2
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_not_written_over(tmp_path, capsys):
    pytest.importorskip("cookiecutter")
    words = ["new", "technique", "--no-input", "--output", str(tmp_path), "--set", "technique=warm-up"]
    assert run(capsys, *words)[0] == 0
    code, _, err = run(capsys, *words)
    assert code == 2
    assert 'eke-warm-up" directory already exists. Remove it, or give another --output.' in err


def test_without_cookiecutter_the_way_to_get_it_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cookiecutter", None)
    monkeypatch.setitem(sys.modules, "cookiecutter.exceptions", None)
    code, _, err = run(capsys, "new", "technique", "--no-input", "--output", str(tmp_path))
    assert (code, err) == (2, "eke: eke new needs cookiecutter. Install it: pip install 'eke[new]'\n")


@pytest.mark.parametrize("how", [["--wheel"], []], ids=["from the checkout", "from an sdist"])
def test_the_wheel_holds_the_templates_file_by_file(tmp_path, how):
    pytest.importorskip("build")
    templates = CORE.parent / "templates"
    if not templates.exists():
        pytest.skip("runs in a checkout")
    command = [sys.executable, "-m", "build", "--no-isolation", *how, "--outdir", tmp_path, CORE]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = {name.removeprefix("eke/_templates/") for name in zipfile.ZipFile(wheel).namelist() if "_templates/" in name}
    files = (file for file in templates.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    assert held == {file.relative_to(templates).as_posix() for file in files}
