"""Optimizer steps, batches, samples and tokens of a run, and how much of it is done; right under accumulation, after a
resume, and where epochs change their length.

The tricks it hides: ``trainer.global_step`` counts optimizer steps only where Lightning itself accumulates; DeepSpeed
accumulates out of Lightning's sight, and there it counts batches. ``estimated_stepping_batches`` is made once, from
the first epoch's length, and is -1, which passes for a number, where data has no length. And a module that steps
several optimizers by hand counts each of them, so that half of a run would seem to be all of it.
"""

from __future__ import annotations

from math import ceil, isfinite
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.data import extract_batch_size

from eke.seams.batch import tensors
from eke.spec import EkeError


class LengthError(EkeError, MisconfigurationException, ValueError):
    """Something goes by the length of the run, and that is not known or makes no sense."""


class Progress:
    """What has been done so far, over all processes.

    Attributes:
        micro_steps: Batches trained on, per process.
        samples: Samples trained on, all processes together; counted only if asked for.
        tokens: Integers in the batches' integer tensors of two dimensions, (batch, length), all processes
            together; counted only if asked for.
        at_boundary: The batch at hand is the first of an accumulation window: no gradient is held, so the
            model may change its shape.
    """

    def __init__(self) -> None:
        self.micro_steps = 0
        self.samples = 0
        self.tokens = 0
        self.at_boundary = True
        self.counts: frozenset[str] = frozenset()
        self.trainer: Trainer | None = None  # while in fit
        self._steps = 0
        self._epoch = 0
        self._batch = 0  # batches of this epoch that are through
        self._batches: float = 1  # that it has; asked for anew in each, because techniques change it

    @property
    def steps(self) -> int:
        """Optimizer steps done. Of several optimizers that a module steps by hand, one step of each counts one."""
        trainer = self.trainer
        if trainer is None:
            return self._steps
        if trainer.strategy.handles_gradient_accumulation:
            return trainer.global_step // trainer.accumulate_grad_batches
        return trainer.global_step // _by_hand(trainer)

    @property
    def share(self) -> float:
        """How much of the run is done, from 0 to 1, by ``max_steps`` or ``max_epochs``, whichever comes first.

        By epochs it is exact where epochs differ in length: each counts as much as any other.
        """
        trainer, shares = self.trainer, [0.0]
        if trainer is None:
            return 0.0
        if trainer.max_steps > 0:
            shares.append(self.steps * _by_hand(trainer) / trainer.max_steps)
        if trainer.max_epochs is not None and trainer.max_epochs > 0 and isfinite(self._batches):
            window = trainer.accumulate_grad_batches
            whole = ceil(self._batches / window)
            done = whole if self._batch >= self._batches else self._batch // window
            shares.append((self._epoch * whole + done) / (whole * trainer.max_epochs))
        return min(1.0, max(shares))

    @property
    def length(self) -> int:
        """Optimizer steps that the run will have, by the length of its first epoch.

        Raises:
            LengthError: outside a run, or one without an end that could be told.
        """
        return self.length_for("This")

    def length_for(self, who: str, instead: str = "") -> int:
        """As :attr:`length`; the error names who asks, and what else it could be given."""
        steps = self.trainer.estimated_stepping_batches if self.trainer is not None else float("inf")
        if not isfinite(steps) or steps < 1:
            raise LengthError(
                f"{who} goes by the length of the run, which is not known: the Trainer has neither max_steps nor "
                f"max_epochs over data of a known length. Give Trainer(max_steps=...){instead and f', or {instead}'}."
            )
        if self.trainer.max_steps > 0:  # which counts the steps of all optimizers
            steps = min(steps, self.trainer.max_steps // _by_hand(self.trainer))
        return int(steps)

    def connect(self, trainer: Trainer | None, counts: frozenset[str] = frozenset()) -> None:
        self._steps = self.steps
        self.trainer = trainer
        self.counts = counts

    def begin(self, trainer: Trainer) -> None:
        """Called when training starts, resumed or not."""
        self._batches = trainer.fit_loop.max_batches

    def before_batch(self, trainer: Trainer, batch_idx: int) -> None:
        # Lightning starts a new window at each epoch, so the index in the epoch decides.
        self.at_boundary = batch_idx % trainer.accumulate_grad_batches == 0
        self._epoch, self._batch, self._batches = trainer.current_epoch, batch_idx, trainer.fit_loop.max_batches

    def after_batch(self, trainer: Trainer, batch: Any) -> None:
        self.micro_steps += 1
        self._batch += 1
        if "samples" in self.counts:
            self.samples += extract_batch_size(batch) * trainer.world_size
        if "tokens" in self.counts:
            self.tokens += _tokens(batch) * trainer.world_size

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps, **self.counted()}

    def counted(self) -> dict[str, int]:
        """What it counts itself."""
        counted = {"micro_steps": self.micro_steps, "samples": self.samples, "tokens": self.tokens}
        return {**counted, "epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._steps = state["steps"]
        self.micro_steps = state["micro_steps"]
        self.samples = state["samples"]
        self.tokens = state["tokens"]
        self._epoch, self._batch = state["epoch"], state["batch"]


def _by_hand(trainer: Trainer) -> int:
    """How many optimizers a module steps by hand, 1 where Lightning does it. Before they are there: 1."""
    module = trainer.lightning_module
    return 1 if module is None or module.automatic_optimization else max(1, len(trainer.optimizers))


class Until:
    """A point of a run, and how far the run has come towards it.

    Args:
        progress: Of the run.
        when: Optimizer steps as a whole number; a share of the run as a float up to 1; or words, a number with one of
            ``steps``, ``epochs``, ``tokens``, ``samples``, ``of the run``: ``"3 epochs"``, ``"2e9 tokens"``.
        who: Names the argument in errors, such as ``"LengthWarmup(duration=0.5)"``.
        instead: Whether the user gave the point, and so could give another one.

    Raises:
        LengthError: another form; a number below zero; a share above 1.
    """

    UNITS = ("steps", "epochs", "tokens", "samples", "of the run")

    def __init__(self, progress: Progress, when: float | int | str, who: str = "This", instead: bool = True) -> None:
        self.progress, self.who = progress, who
        self._instead = "a number of optimizer steps in its place" if instead else ""
        self.number, self.unit = _parsed(when, who)
        self.asked = when

    def check(self) -> None:
        """Refuse a share of a run of unknown length. Called when training starts."""
        if self.unit == "of the run":
            self.progress.length_for(self.who, self._instead)

    @property
    def done(self) -> float:
        """How much of the way to it is done, from 0 to 1."""
        if self.number == 0:
            return 1.0
        return min(1.0, self._now() / self.number)

    @property
    def reached(self) -> bool:
        """Whether the run has come to it."""
        return self._now() >= self.number

    @property
    def steps(self) -> int:
        """It in optimizer steps, by the length of the first epoch.

        Raises:
            LengthError: samples and tokens are not known in steps; a run of unknown length.
        """
        if self.unit == "steps":
            return int(self.number)
        if self.unit in ("tokens", "samples"):
            raise LengthError(f"{self.who}: {self.asked!r} is no number of steps before it is reached. Give steps.")
        length = self.progress.length_for(self.who, self._instead)
        if self.unit == "of the run":
            return round(self.number * length)
        return round(self.number * length / max(self.progress.trainer.max_epochs or 1, 1))

    def _now(self) -> float:
        if self.unit == "of the run":
            return self.progress.share
        if self.unit == "epochs":
            done, whole = self.progress._batch, self.progress._batches
            return self.progress._epoch + (done / whole if isfinite(whole) and whole else 0)
        return getattr(self.progress, self.unit)


def _parsed(when: float | int | str, who: str) -> tuple[float, str]:
    number: Any = when
    unit = ""
    if isinstance(when, str):
        word, _, unit = when.strip().partition(" ")
        unit = {"step": "steps", "epoch": "epochs", "token": "tokens", "sample": "samples"}.get(unit, unit)
        try:
            number = float(word)
        except ValueError:
            number = None
        if unit not in Until.UNITS:
            number = None
    elif isinstance(when, bool) or not isinstance(when, (int, float)):
        number = None
    else:
        unit = "of the run" if isinstance(when, float) and when <= 1 else "steps"
    if (
        number is None
        or not 0 <= number < float("inf")
        or (unit == "of the run" and number > 1)
        or (unit == "steps" and number != int(number))
    ):
        raise LengthError(
            f"{who}: {when!r} is no point of a run. Give optimizer steps as a whole number, a share of the run as a "
            "float up to 1, or words such as '3 epochs', '2e9 tokens', '0.3 of the run'."
        )
    return float(number), unit


def _tokens(batch: Any) -> int:
    """Elements of the first integer tensor with two dimensions: the ids, not the labels beside them."""
    whole = (one for one in tensors(batch) if one.ndim == 2 and not one.is_floating_point())
    return next((one.numel() for one in whole), 0)
