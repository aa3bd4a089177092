"""What the report says of a run, with a technique that is exact, and that it leaves the run alone."""

import json
from functools import partial

import eke
import pytest
import torch
from eke.seams import trial
from eke.seams.blocks import find_blocks
from eke.testing import TinyBlocks, assert_same, fit
from eke_report import Report, callback, paired, render
from eke_report.command import main
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.checkpoint import checkpoint

STEPS = 40
SHORT = {"start": 2, "rounds": 2, "block": 2, "ceilings": False}


class Remat(eke.TechniqueCallback):
    """Recomputes blocks: less memory, more time, the same bits."""

    technique = eke.Technique(name="remat", kind="callback", effects=("changes saved tensors",), exactness="exact")

    def __init__(self):
        self.wrapped = []

    def alter_model(self, run):
        pl_module = run.module
        for block in find_blocks(pl_module).modules if not self.wrapped else ():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            self.wrapped.append(block)

    def end_run(self, run):
        for block in self.wrapped:
            del block.forward
        self.wrapped = []


class Noisy(eke.TechniqueCallback):
    technique = eke.Technique(name="noisy", kind="callback", effects=("changes gradients",), exactness="approximate")


class Slow(LightningModule):
    """Its step takes ten times as long when a switch is on."""

    def __init__(self):
        super().__init__()
        self.layer, self.on = nn.Linear(4, 1), False

    def training_step(self, batch, batch_idx):
        clock.now += 0.010 if self.on else 0.001
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


clock = Clock()


class Slows(eke.TechniqueCallback):
    """Exact, and costs ten times the step."""

    technique = eke.Technique(name="slows", kind="callback", effects=("changes saved tensors",), exactness="exact")

    def alter_model(self, run):
        pl_module = run.module
        pl_module.on = True

    def end_run(self, run):
        pl_module = run.module
        pl_module.on = False


@pytest.fixture
def by_hand(monkeypatch):
    """Time that passes only in the training step."""
    monkeypatch.setattr(trial, "perf_counter", clock)


def run(*callbacks, steps=STEPS, **options):
    data = torch.utils.data.DataLoader(torch.randn(4 * steps, 4), batch_size=4)
    trainer = Trainer(
        **{
            "max_steps": steps,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": list(callbacks),
            **options,
        }
    )
    model = Slow()
    trainer.fit(model, data)
    return model


def report_of(*callbacks, **options):
    report = Report(**{**SHORT, "file": ""})
    run(*callbacks, report, **options)
    return report.result


def test_an_exact_technique_is_switched_and_its_ratio_is_right(by_hand):
    found = report_of(Slows())["techniques"]["slows"]
    assert found["measured"]
    assert found["step_ratio"] == pytest.approx([10.0, 10.0, 10.0])
    assert found["control"] == pytest.approx([1.0, 1.0, 1.0])
    assert found["told_apart"]


def test_the_step_that_is_reported_is_the_one_with_the_techniques_on(by_hand):
    found = report_of(Slows())
    assert found["step_s"] == pytest.approx(0.010)
    assert found["samples_per_s"] == pytest.approx(400.0)


@pytest.mark.parametrize("window", [1, 3])
def test_switching_happens_between_accumulation_windows_only(window, by_hand):
    seen = []

    class Looks(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(((trainer.current_epoch, batch_idx // window), pl_module.on))

    found = report_of(Slows(), Looks(), steps=40, accumulate_grad_batches=window)
    assert {on for _, on in seen} == {True, False}
    assert len(set(seen)) == len({number for number, _ in seen})  # one state in each window
    assert found["techniques"]["slows"]["step_ratio"][0] == pytest.approx(10.0)


def test_the_model_is_on_again_for_validation_and_after_the_measurement(by_hand):
    seen = []

    class Looks(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(pl_module.on)

    report_of(Slows(), Looks())
    first_off = seen.index(False)
    assert first_off >= 2
    assert all(seen[-10:])


class Relapses(Slows):
    """Is on again by a hook of its own, as one that follows a growing model."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.on = True

    def around_step(self, run, call_next, batch, *args):
        clock.now += 0.010
        return call_next(batch, *args)

    def alter_batch(self, run, batch):
        clock.now += 0.100  # not within a step that is timed, but seen if it is not left out
        return batch + 0.0


def test_of_a_technique_that_is_off_nothing_is_called(by_hand):
    found = report_of(Relapses())["techniques"]["slows"]
    assert found["step_ratio"] == pytest.approx([20.0, 20.0, 20.0])


class Doubles(eke.TechniqueCallback):
    """Changes the optimizer, draws numbers, and doubles the time of a step in the second half of a run."""

    technique = eke.Technique(
        name="doubles", kind="callback", effects=("changes optimizer", "reads loss"), exactness="approximate"
    )

    def alter_optimizer(self, run, optimizer):
        return torch.optim.SGD(optimizer.param_groups, lr=0.05)

    def around_step(self, run, call_next, batch, *args):
        torch.rand(3)
        clock.now += 0.001 * (run.progress.share >= 0.5)
        return call_next(batch, *args)


def test_what_cannot_be_switched_is_measured_in_copies_of_the_run(by_hand):
    """Of the twelve steps of a copy's run the first is not timed, nor the last, in which memory is counted; five of the
    ten between are in the second half."""
    found = report_of(Slows(), Doubles())
    effect = found["techniques"]["doubles"]
    assert effect["step_ratio"] == pytest.approx([(10 * 10 + 5) / 100] * 3)  # beside the other one, which is on
    assert (effect["rounds"], effect["copies"], effect["measured"]) == (2, 12, True)
    assert found["techniques"]["slows"]["step_ratio"][0] == pytest.approx(10.0, rel=0.1)
    assert "in 2 rounds of copies of 12 steps" in render(found)
    unseen = report_of(Noisy())["techniques"]["noisy"]
    assert unseen["step_ratio"] == pytest.approx([1.0] * 3)
    assert unseen["memory_ratio"] == 1.0


@pytest.mark.parametrize("data", ["samples", "stream"])
def test_copies_leave_the_run_its_bits_its_random_numbers_and_its_data(by_hand, data):
    class Stream(torch.utils.data.IterableDataset):
        read = 0

        def __iter__(self):
            for sample in torch.randn(160, 4, generator=torch.Generator().manual_seed(3)):
                Stream.read += 1
                yield sample

    class Drops(Slow):
        def training_step(self, batch, batch_idx):
            return super().training_step(nn.functional.dropout(batch, 0.5), batch_idx)

    found = []
    for callbacks in ([Doubles()], [Doubles(), Report(**SHORT, file="")]):
        torch.manual_seed(0)
        model, Stream.read = Drops(), 0
        samples = torch.randn(160, 4, generator=torch.Generator().manual_seed(3)) if data == "samples" else Stream()
        loader = torch.utils.data.DataLoader(samples, batch_size=4, shuffle=data == "samples")
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(max_steps=20, accelerator="cpu", enable_model_summary=False, callbacks=callbacks, **options)
        trainer.fit(model, loader)
        found.append({**model.state_dict(), "random": torch.get_rng_state(), "read": Stream.read})
    assert_same(*found, "without the report, then with it")
    effect = callbacks[1].result["techniques"]["doubles"]
    assert effect["measured"], effect["why"]


def test_why_there_are_no_copies_is_said(by_hand):
    class Locked(Slow):
        def __deepcopy__(self, memo):
            raise TypeError("a lock is held")

    report = Report(**SHORT, file="")
    loader = torch.utils.data.DataLoader(torch.randn(32, 4), batch_size=4)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    Trainer(max_steps=8, callbacks=[Noisy(), report], **quiet).fit(Locked(), loader)
    short = Report(**{**SHORT, "start": 9}, file="")
    run(Noisy(), short, steps=5)
    none = Report(**SHORT, pairs=0, file="")
    run(Noisy(), none, steps=5)
    words = [one["techniques"]["noisy"].get("why", "") for one in (report.result, short.result, none.result)]
    begins = "it changes the mathematics (approximate), and "
    assert words[0].startswith(begins + "Locked or a technique cannot be copied: a lock is held")
    assert words[1].startswith(begins + "the run ended before start=9 steps")
    assert words[2] == begins + "pairs=0 asks for no runs of copies: what it gives takes paired runs"
    assert "eke report pairs MODULE:BUILD TECHNIQUE" in render(none.result)


def test_a_copys_error_is_a_row_and_not_the_runs(by_hand):
    class Once(Slow):
        def on_fit_start(self):
            if self.trainer.max_steps == 12:
                raise RuntimeError("the database\n is busy")

    report = Report(**SHORT, file="")
    loader = torch.utils.data.DataLoader(torch.randn(32, 4), batch_size=4)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    Trainer(max_steps=8, callbacks=[Noisy(), report], **quiet).fit(Once(), loader)
    why = report.result["techniques"]["noisy"]["why"]
    assert why == "copies of the run with it and without it end in an error: the database is busy"


def test_attention_without_a_pattern_is_switched():
    """Its record declares by its arguments that sums are reordered at most."""
    attention = pytest.importorskip("eke_attention")
    plain = fit(TinyBlocks(), attention.Attention(), epochs=8)
    report = Report(**SHORT, file="")
    watched = fit(TinyBlocks(), attention.Attention(), report, epochs=8)
    assert_same(plain.state["weights"], watched.state["weights"], "weights without the report, then with it")
    effect = report.result["techniques"]["attention"]
    assert effect["measured"]
    assert "copies" not in effect
    reason = callback._fixed(attention.Attention(attention.SlidingWindow(4)), TinyBlocks())
    assert reason == "it changes the mathematics (model-changing)"


def test_a_run_that_is_too_short_says_so_and_gives_no_number(by_hand):
    found = report_of(Slows(), steps=10)["techniques"]["slows"]
    assert not found["measured"]
    assert "the run was too short: it ended after" in found["why"]


def test_no_gain_is_said_plainly():
    rounds = [[1.0, 1.01, 0.99, 1.0], [1.0, 0.99, 1.01, 1.0]]
    found = trial.compare(rounds)
    assert not found["told_apart"]
    said = render({**BARE, "techniques": {"idle": found}})
    assert "idle           no measurable gain or loss of time: 1.00" in said


BARE = {
    "device": "cpu",
    "precision": "32-true",
    "processes": 1,
    "batches": 3,
    "step_s": 0.01,
    "samples_per_s": 400.0,
    "waiting_for_data": 0.25,
    "flops_per_step": None,
    "memory": {"total": 3 * 2**20, "parameters": 2**20, "activations": 2 * 2**20, "buffers": 0},
    "techniques": {},
}


def test_the_text_has_units_and_names_causes():
    text = render({**BARE, "utilization": 0.5, "ceiling_flops_per_s": 2e11})
    assert "10.0 ms, 400 samples a second" in text
    assert "25.0 % of the time is waiting for batches" in text
    assert "50 % of the 200 GFLOP/s" in text
    assert "3.0 MiB: parameters 1.0 MiB, activations 2.0 MiB" in text
    assert "no technique of Eke was in this run" in text


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}])
def test_a_run_with_the_report_comes_to_the_bits_of_one_without(options):
    plain = fit(TinyBlocks(), Remat(), epochs=8, **options)
    report = Report(**SHORT, file="")
    watched = fit(TinyBlocks(), Remat(), report, epochs=8, **options)
    assert_same(plain.state["weights"], watched.state["weights"], "weights without the report, then with it")
    assert report.result["techniques"]["remat"]["memory_ratio"] < 1.0


def test_recomputing_costs_the_flops_of_one_more_forward_of_the_blocks():
    report = Report(**SHORT, file="")
    fit(TinyBlocks(), Remat(), report, epochs=3)
    on, off = (report._counts[name]["flops"] for name in ("on", "remat"))
    assert off < on < 4 / 3 * off


def test_json_is_written_beside_the_logs_and_no_older_one_is_lost(tmp_path, by_hand):
    for _ in range(2):
        run(Slows(), Report(**SHORT), default_root_dir=tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["effects-1.json", "effects.json"]
    assert json.loads((tmp_path / "effects.json").read_text())["techniques"]["slows"]["told_apart"]


def test_tensorboard_and_csv_get_the_numbers(tmp_path, by_hand):
    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "board")]
    run(Slows(), Report(**SHORT), logger=loggers)
    (csv,) = (tmp_path / "csv").rglob("metrics.csv")
    head, line = csv.read_text().splitlines()[:2]
    assert dict(zip(head.split(","), line.split(","), strict=True))["effect/slows/step_time_ratio"].startswith("10.0")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (tmp_path / "board").rglob("events.*")
    board = EventAccumulator(str(events))
    board.Reload()
    assert board.Scalars("effect/slows/step_time_ratio")[0].value == pytest.approx(10.0)


def test_the_command_prints_a_file_or_the_newest_of_a_folder(tmp_path, by_hand, capsys):
    run(Slows(), Report(**SHORT), default_root_dir=tmp_path)
    capsys.readouterr()
    for path in (tmp_path, tmp_path / "effects.json"):
        assert main([str(path)]) == 0
        assert "slows          a step takes 10.00 of its time without it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist"),
        ("", "holds no effects.json"),
        ("{}", "is no effect report"),
        ("nonsense", "is no effect"),
    ],
)
def test_a_wrong_file_gets_one_line(tmp_path, content, said, capsys):
    path = tmp_path / "run"
    if content is not None:
        path.mkdir()
    if content:
        path = path / "effects.json"
        path.write_text(content)
    assert main([str(path)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def build():
    return TinyBlocks(), TinyBlocks().train_dataloader()


def test_paired_runs_compare_with_and_without_from_the_same_start(monkeypatch):
    monkeypatch.setattr(eke, "trainer_kwargs", lambda **recipe: {"callbacks": [Remat() for _ in recipe]})
    found = paired(build, {"remat": {}}, steps=8, seeds=2, warmup=2, accelerator="cpu")
    pair = found["pairs"]["remat"]
    assert pair["memory_ratio"] < 1.0
    assert pair["loss"][0] == pair["loss"][1]  # it is exact
    assert "remat" in render(found)
    assert "against" in render(found)


def test_the_command_makes_paired_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(eke, "trainer_kwargs", lambda **recipe: {"callbacks": [Remat() for _ in recipe]})
    (tmp_path / "my_project.py").write_text(
        "from eke.testing import TinyBlocks\ndef build():\n    return TinyBlocks(), TinyBlocks().train_dataloader()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ["pairs", "my_project:build", "remat", "--steps", "8", "--seeds", "1", "--accelerator", "cpu"]
    file = tmp_path / "pairs.json"
    assert main([*words, "--json", str(file)]) == 0
    assert "Paired runs: 8 steps, 1 seeds" in capsys.readouterr().out
    assert main([str(file)]) == 0
    assert main([*words, "--json", str(file)]) == 2
    assert "exists. Give another name." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: Report(pairs=1), "pairs=1, pair_steps=12: give 2 rounds or more, or 0 for none"),
        (lambda: Report(rounds=1), "rounds=1, block=4 leave nothing to compare: each has to be 2 or more"),
        (lambda: paired(build, {}), "the recipe is empty"),
        (lambda: paired(build, {"remat": {}}, steps=3), "steps=3, warmup=5, seeds=3 leave nothing to time"),
    ],
)
def test_numbers_that_leave_nothing_to_compare_are_refused_at_once(act, said):
    with pytest.raises(ValueError, match=said):
        act()


def test_a_compiled_model_is_not_switched(by_hand):
    report = Report(**SHORT, file="")
    model = Slow()
    model.layer.compile()
    assert callback._fixed(Slows(), model) == "the model is compiled, and each switch would compile it again"
    assert report.result is None
