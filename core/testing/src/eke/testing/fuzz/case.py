"""What a random run consists of, as plain data that can be printed, changed and run again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from eke import ArgumentError

# Option of a run to its value where the case says nothing: the plainest run there is.
DEFAULTS: dict[str, Any] = {
    "dropout": 0.0,
    "optimizer": "adamw",  # adamw, adam, sgd
    "groups": 1,  # of parameters, each with a learning rate of its own
    "schedule": "none",  # none, warmup, onecycle, cosine, exponential, plateau
    "interval": "step",  # of the schedule: step, epoch
    "frequency": 1,  # of the schedule
    "epochs": 2,
    "max_steps": None,  # ends the run within an epoch
    "ends_by": "max_epochs",  # of the resumed run: max_epochs, max_steps (as many)
    "batches": 4,  # in an epoch
    "batch": 3,  # samples
    "ragged": False,  # the last batch has one sample less
    "accumulate": 1,
    "clip": None,
    "clip_by": "norm",  # norm, value
    "precision": "32-true",
    "limit": None,  # limit_train_batches
    "validate": 0,  # validation batches
    "val_check": 1.0,  # val_check_interval
    "val_epochs": 1,  # check_val_every_n_epoch
    "sanity": 0,  # num_sanity_val_steps
    "loader": "sequential",  # and shuffle, generator, weighted, replacement, own batches, stateful, iterable, endless
    "augment": False,  # samples are changed by random numbers when they are fetched
    "workers": 0,
    "persistent": False,  # workers
    "reload": 0,  # reload_dataloaders_every_n_epochs
    "beside": "none",  # a callback of Lightning's: early stopping, accumulation, averaging, late averaging
    "processes": 1,
    "interpreter": False,  # the resumed run starts Python anew; elsewhere it forks from one that has trained nothing
}

# Way to save to what it means.
WAYS: dict[str, str] = {
    "steps": "ModelCheckpoint(every_n_train_steps=every)",
    "epochs": "ModelCheckpoint(every_n_epochs=every)",
    "validation": "ModelCheckpoint(every_n_epochs=every, save_on_train_epoch_end=False)",
    "hand": "trainer.save_checkpoint in hook `hook` of a callback, the `at`-th time",
    "after fit": "stopped at an epoch's end, then trainer.save_checkpoint",
    "exception": "ModelCheckpoint(save_on_exception=True), and an error in hook `hook`, the `at`-th time",
    "kill": "ModelCheckpoint(every_n_train_steps=every), and kill -9 in hook `hook`, the `at`-th time",
}


@dataclass(frozen=True)
class Case:
    """One random run.

    Args:
        model: Name of a model, as :mod:`eke.testing.fuzz.subjects` knows it.
        techniques: Name of a technique, or ``"module:Class"`` of one that is not installed, to its arguments.
        options: What differs from :data:`DEFAULTS`.
        save: ``way`` of :data:`WAYS`, and what that needs: ``every``, ``hook``, ``at``; ``which`` of several files is
            taken, as a share.
    """

    model: str = "TinyBlocks"
    techniques: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    save: Mapping[str, Any] = field(default_factory=lambda: {"way": "hand", "hook": "on_train_batch_end", "at": 3})

    def __post_init__(self) -> None:
        unknown = sorted(set(self.options) - set(DEFAULTS))
        if unknown:
            raise ArgumentError(f"options has {', '.join(unknown)}. The options: {', '.join(DEFAULTS)}.")
        if self.save.get("way") not in WAYS:
            raise ArgumentError(f"save has way={self.save.get('way')!r}. The ways: {', '.join(WAYS)}.")

    def __getitem__(self, option: str) -> Any:
        return self.options.get(option, DEFAULTS[option])

    def but(self, **changes: Any) -> Case:
        """The same with other fields."""
        return replace(self, **changes)

    def __str__(self) -> str:
        techniques = " + ".join(_call(name, arguments) for name, arguments in self.techniques.items()) or "nothing"
        options = " ".join(f"{name}={value!r}" for name, value in self.options.items())
        save = " ".join(f"{name}={value!r}" for name, value in self.save.items())
        return f"{self.model}: {techniques} | {options or 'defaults'} | {save}"


def _call(name: str, arguments: Mapping[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})" if arguments else name
