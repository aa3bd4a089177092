"""Runs in seconds on a CPU: a tiny model on a tiny text."""

import json
import random
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from data import Text, TextError, Windowed, Windows, find_files, split
from lightning.pytorch import Callback
from model import ByteGPT, lr_factor
from report import Meter, cost_to, verdict

TINY = ["--layers", "2", "--width", "32", "--length", "16", "--batch", "4", "--threads", "1", "--accelerator", "cpu"]


@pytest.fixture
def text(tmp_path):
    words = random.Random(0).choices(["alpha ", "beta ", "gamma ", "delta\n"], k=3000)
    file = tmp_path / "words.txt"
    file.write_text("".join(words))
    return file


def run(*arguments):
    return train.main([*TINY, *map(str, arguments)])


def report(folder):
    return json.loads((folder / "train.json").read_text())


def test_the_loss_falls_far_below_guessing_and_the_files_are_there(text, tmp_path, capsys):
    assert run("--text", text, "--out", tmp_path / "runs", "--steps", 48, "--plain-only") == 0
    (plain,) = report(tmp_path / "runs/1")["runs"]
    steps, seconds, losses = zip(*plain["curve"], strict=True)
    assert steps == tuple(range(4, 49, 4))
    assert losses[-1] < 3 < 5.5 < torch.log(torch.tensor(256.0))
    assert sorted(seconds) == list(seconds)
    assert plain["peak_memory_bytes"] > 16 * plain["parameters"]  # weights, gradients and both moments at least
    assert (tmp_path / "runs/1/train.png").stat().st_size > 10_000
    assert "plain, 2 blocks" in capsys.readouterr().out


def test_an_older_run_is_never_overwritten(text, tmp_path):
    for _ in range(2):
        run("--text", text, "--out", tmp_path / "runs", "--steps", 2, "--plain-only")
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["1", "2"]


def test_plain_recipe_and_smaller_are_charged_alike(text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nothing is written outside --out
    # An empty recipe file: the second run is the plain one again, so that all must agree but the clock.
    (tmp_path / "recipe.yaml").write_text("{}")
    arguments = ["--text", text, "--out", tmp_path / "runs", "--steps", 24, "--recipe", tmp_path / "recipe.yaml"]
    assert run(*arguments) == 0
    assert not Path("checkpoints").exists()
    plain, recipe, smaller = report(tmp_path / "runs/1")["runs"]
    for figure in ("parameters", "steps", "peak_memory_bytes", "nats_per_byte"):
        assert recipe[figure] == plain[figure], figure
    assert smaller["layers"] == 1
    assert smaller["parameters"] < plain["parameters"]
    assert "In the recipe's time a plain model of 1 block came" in capsys.readouterr().out


def test_each_step_is_charged_and_no_evaluation(text, tmp_path, monkeypatch):
    def slowed(method, seconds):
        def slow(*arguments):
            until = time.process_time() + seconds
            while time.process_time() < until:
                pass
            return method(*arguments)

        return slow

    monkeypatch.setattr(ByteGPT, "training_step", slowed(ByteGPT.training_step, 0.3))
    monkeypatch.setattr(ByteGPT, "validation_step", slowed(ByteGPT.validation_step, 2))
    run("--text", text, "--out", tmp_path / "runs", "--steps", 4, "--plain-only")
    (plain,) = report(tmp_path / "runs/1")["runs"]
    assert len(plain["curve"]) == 4  # of at least two seconds each
    assert 0.9 < plain["cost"] < 2  # three steps: the last is the one whose memory is counted


def test_the_smaller_model_gets_as_many_steps_as_the_recipe_paid_for(text, tmp_path, monkeypatch):
    costs = iter([0.4, 0.2])
    monkeypatch.setattr(Meter, "cost_per_step", lambda meter: next(costs))
    options = train.parse([*TINY])
    smaller = train.Run("smaller", layers=1, lr=1e-3, steps=0)
    data = Text(text, options.length, options.batch, seed=0)
    assert train.steps_within(10.0, smaller, options, data, tmp_path) == 24  # a whole number of evaluations
    assert train.steps_within(10.0, smaller, options, data, tmp_path) == 24  # resumed: not timed again


def test_an_interrupted_comparison_goes_on_to_the_same_loss(text, tmp_path, monkeypatch):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 30:
                raise OSError("the machine is gone")

    arguments = ["--text", text, "--steps", 48, "--plain-only"]
    run(*arguments, "--out", tmp_path / "whole")
    stock = train.make_trainer
    with monkeypatch.context() as patch:
        patch.setattr(
            train,
            "make_trainer",
            lambda recipe, options, steps, every, callbacks: stock(recipe, options, steps, every, [*callbacks, Stop()]),
        )
        with pytest.raises(OSError, match="the machine is gone"):
            run(*arguments, "--out", tmp_path / "cut")
    assert not (tmp_path / "cut/1/train.json").exists()
    assert run("--resume", tmp_path / "cut/1") == 0
    (whole,), (resumed,) = report(tmp_path / "whole/1")["runs"], report(tmp_path / "cut/1")["runs"]
    assert [(step, loss) for step, _, loss in resumed["curve"]] == [(step, loss) for step, _, loss in whole["curve"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "nowhere.txt"], "nowhere.txt does not exist. Give a text file or a folder of them."),
        (["--text", "{short}"], "need 65 and 17. Give a longer text, or lower --batch or --length."),
        (["--text", "{text}", "--recipe", "nothing"], "no technique named 'nothing' is installed."),
        (["--text", "{text}", "--recipe", "a=1"], "'a=1' names no technique: write name or name:key=value,key=value."),
        (["--text", "{text}", "--width", "50"], "width=50 does not divide into heads of 32."),
        (["--text", "{text}", "--precision", "7"], "Precision '7' is invalid."),
        (["--steps", "1"], "argument --steps: '1' is no number of 2 or more."),
        (["--stpes", "10"], "unrecognized arguments: --stpes 10"),
        (["--resume", "nowhere"], "nowhere holds no options.json: nothing can be resumed."),
    ],
)
def test_what_cannot_work_gets_one_line_and_exit_code_2(arguments, message, text, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("too short")
    places = {"text": text, "short": tmp_path / "short.txt"}
    try:
        code = run("--out", tmp_path / "runs", *(argument.format(**places) for argument in arguments))
    except SystemExit as stop:  # argparse's own
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.startswith("train.py: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_training_and_validation_files_are_disjoint_and_keep_their_side(tmp_path):
    names = [f"{folder}/{number}.txt" for folder in "ab" for number in range(100)]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    files = find_files(tmp_path)
    training, held_out = split(tmp_path, files)
    assert sorted(training + held_out) == files
    assert len(files) == 200
    assert not set(training) & set(held_out)
    assert 2 <= len(held_out) <= 25
    assert split(tmp_path, files[::2]) == (
        [f for f in training if f in files[::2]],
        [f for f in held_out if f in files[::2]],
    )


def test_the_standard_library_is_read_without_its_tests_and_other_packages():
    files = find_files(None)
    assert any(file.name == "argparse.py" for file in files)
    assert all(file.suffix == ".py" for file in files)
    assert not [file for file in files if {"test", "tests", "site-packages"} & set(file.parts)]


def test_a_text_with_too_little_for_one_batch_names_both_numbers(tmp_path):
    (tmp_path / "short.txt").write_text("x" * 1000)
    with pytest.raises(
        TextError, match="gives 950 bytes for training and 50 for validation; --batch 8 and --length 128"
    ):
        Text(tmp_path / "short.txt", length=128, batch=8, seed=0)


def test_windows_overlap_by_one_byte_and_cover_the_text():
    windows = Windows(torch.arange(21, dtype=torch.uint8), length=5)
    assert [(window[0].item(), window[-1].item()) for window in windows] == [(0, 5), (5, 10), (10, 15), (15, 20)]


def test_a_loader_goes_on_where_its_state_was_taken():
    def loader():
        return Windowed(Windows(torch.arange(201, dtype=torch.uint8), length=5), batch=4, seed=3)

    def batches(source):
        return [batch[:, 0].tolist() for batch in source]

    whole = loader()
    first, second = batches(whole), batches(whole)
    assert first != second
    assert sorted(sum(first, [])) == list(range(0, 200, 5))
    cut = loader()
    walk = iter(cut)
    for _ in range(3):
        next(walk)
    resumed = loader()
    resumed.load_state_dict(cut.state_dict())
    assert batches(resumed) == first[3:]
    assert batches(resumed) == second


def test_the_learning_rate_rises_then_falls_straight_to_zero_at_its_own_end():
    factors = [lr_factor(step, steps=12, rise=2) for step in range(13)]
    assert factors == [0.5, 1, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0]


def test_a_byte_is_predicted_from_earlier_bytes_only():
    torch.manual_seed(0)
    model = ByteGPT(layers=2, width=32, length=8, lr=1e-3)
    tokens = torch.randint(256, (1, 8))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 256
    same = (model(tokens) == model(changed)).all(-1)[0]
    assert same.tolist() == [True] * 5 + [False] * 3


def test_the_time_to_a_loss_is_read_off_the_line_between_evaluations():
    curve = [[10, 1.0, 4.0], [20, 2.0, 3.0], [30, 4.0, 1.0]]
    assert cost_to(2.0, curve) == 3.0
    assert cost_to(3.0, curve) == 2.0
    assert cost_to(4.5, curve) == 1.0
    assert cost_to(0.5, curve) is None


def test_the_verdict_says_when_the_smaller_model_wins_and_when_the_recipe_does_not_get_there():
    def made(loss, cost, layers=8):
        return {"nats_per_byte": loss, "cost": cost, "layers": layers, "curve": [[1, cost, loss]]}

    lines = " ".join(verdict([made(2.0, 60), made(2.1, 30), made(1.9, 30, 1)]))
    assert "The recipe did not reach the plain run's final loss: 2.100 nats a byte against 2.000, in 0.50" in lines
    assert "a plain model of 1 block came lower: 1.900 nats a byte against 2.100" in lines
    assert "the smaller model is the better buy" in lines
    lines = " ".join(verdict([made(2.0, 60), made(1.9, 30), made(1.95, 30, 1)]))
    assert "The recipe reached the plain run's final loss in 0.50 of its time." in lines
    assert "a plain model of 1 block came no lower" in lines
