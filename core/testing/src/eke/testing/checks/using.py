"""A technique can be used as people use one: copied, pickled, given in a YAML file, fitted again."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from eke import registry
from eke.quiet import quiet
from eke.testing.checks.common import empty_folder, finite_losses
from eke.testing.checks.subject import Subject
from eke.testing.compare import assert_same, copied
from eke.testing.models import tensors
from eke.testing.ranks import run_alone
from lightning.pytorch import Callback, LightningModule


def pickles_and_copies(subject: Subject) -> None:
    """The technique pickles and deep-copies before and after a run; so does the model, in mid-run too."""
    for name, duplicate in (("pickled", _pickled), ("deep-copied", copy.deepcopy)):
        technique = subject.build()
        twin = _try(name, "a new technique", duplicate, technique)
        states = [subject.fit(subject.model(), one).state for one in (technique, twin)]
        assert_same(*states, f"state after a run with the technique, then with one {name}")
    watch, technique = _CopyInMidRun(), subject.build()
    done = subject.fit(subject.model(), technique, callbacks=[watch])
    assert watch.problem is None, watch.problem
    for name, duplicate in (("pickled", _pickled), ("deep-copied", copy.deepcopy)):
        _try(name, "the technique after a run", duplicate, technique)
        twin = _try(name, "the model after a run", duplicate, done.model)
        assert_same(dict(done.model.state_dict()), dict(twin.state_dict()), f"weights of the model, then {name}")


def a_command_line_builds_it(subject: Subject) -> None:
    """A LightningCLI builds it from its class path and arguments in a YAML file, and trains."""
    run_alone(lambda: _command_line(subject))


def fits_twice_validates_and_tests(subject: Subject) -> None:
    """One technique object serves fit, validate, test and fit again, with the same Trainer and with a new one."""
    model, technique = subject.model(), subject.build()
    done = subject.fit(model, technique, validate=True)
    first = list(done.state["steps"])
    with quiet():
        for stage in ("validate", "test"):
            before = copied(dict(tensors(model)))
            getattr(done.trainer, stage)(model, verbose=False)
            assert_same(before, copied(dict(tensors(model))), f"weights before {stage}, then after it")
        done.trainer.fit_loop.max_epochs += 1
        done.trainer.fit(model, model.train_dataloader(), model.val_dataloader())
    assert done.trainer.current_epoch == subject.epochs + 1, "the second fit of the same Trainer did not train"
    again = subject.fit(model, technique, validate=True)
    whole = len(first) if subject.chooses_samples else subject.epochs * subject.steps
    assert len(again.state["steps"]) == whole, "the second fit with a new Trainer was short"
    finite_losses(again.state)


class _CopyInMidRun(Callback):
    """Copies the model in mid-run and makes first the copy's weights NaN, then its own: neither may see the other."""

    problem: str | None = None

    def on_train_batch_end(self, trainer: Any, model: LightningModule, outputs: Any, batch: Any, index: int) -> None:
        if self.problem is not None or trainer.global_step != 2:
            return
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            before = model.loss(batch)
            try:
                twin = copy.deepcopy(model)
                same = torch.equal(twin.loss(batch), before)
                other = copy.deepcopy(model)
            except Exception as error:
                self.problem = f"the model cannot be deep-copied in mid-run: {type(error).__name__}: {error}"
                return
            for weight in twin.parameters():
                weight.fill_(torch.nan)
            if not torch.equal(model.loss(batch), before):
                self.problem = "a deep copy made in mid-run shares weights with the model"
                return
            kept = [weight.clone() for weight in model.parameters()]
            for weight in model.parameters():
                weight.fill_(torch.nan)
            if not torch.equal(other.loss(batch), before):
                self.problem = "a deep copy made in mid-run computes with weights that are not its own"
            elif not same:
                self.problem = "a deep copy made in mid-run computes another loss than the model"
            for weight, value in zip(model.parameters(), kept, strict=True):
                weight.copy_(value)


def _command_line(subject: Subject) -> None:
    import yaml
    from lightning.pytorch.cli import LightningCLI

    technique = subject.build()
    model = f"{subject.model.__module__}.{subject.model.__qualname__}"
    entry = {"class_path": f"{type(technique).__module__}.{type(technique).__qualname__}"}
    if subject.arguments:
        entry["init_args"] = subject.arguments
    argument = registry.trainer_argument(technique)
    trainer = {
        "max_epochs": subject.epochs,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **subject.options,
        argument: entry if argument == "strategy" else [entry],
    }
    with quiet(), empty_folder() as folder:
        Path(folder, "config.yaml").write_text(yaml.safe_dump({"model": {"class_path": model}, "trainer": trainer}))
        try:
            cli = LightningCLI(
                LightningModule, subclass_mode_model=True, run=False, save_config_callback=None,
                args=["--config", "config.yaml"],
            )  # fmt: skip
        except SystemExit as error:
            raise AssertionError(f"LightningCLI does not build it from {entry}") from error
        built = [*cli.trainer.callbacks, cli.trainer.precision_plugin, cli.trainer.strategy]
        assert any(type(one) is type(technique) for one in built), f"no {entry['class_path']} in the Trainer it built"
        cli.trainer.fit(cli.model)


def _pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def _try(name: str, what: str, duplicate: Callable[[Any], Any], value: Any) -> Any:
    try:
        return duplicate(value)
    except Exception as error:
        raise AssertionError(f"{what} cannot be {name}: {type(error).__name__}: {error}") from error
