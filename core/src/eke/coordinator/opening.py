"""Who may run, and in which order: all that is decided before anything is touched."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from eke import beside, compose, strategies
from eke.refusal import RunError
from eke.spec import ConflictError, Technique

if TYPE_CHECKING:
    from eke.run import Run
    from eke.technique import TechniqueCallback


def overrides(technique: TechniqueCallback, method: str) -> bool:
    """Whether a technique has a method of its own in place of the base class's."""
    from eke.technique import TechniqueCallback

    return getattr(type(technique), method) is not getattr(TechniqueCallback, method)


def records(techniques: Iterable[TechniqueCallback], trainer: Trainer) -> list[Technique]:
    """The records of all that takes part in a run: techniques, strategy and precision."""
    parts = (trainer.strategy, trainer.precision_plugin)
    others = [record for part in parts if (record := getattr(type(part), "technique", None)) is not None]
    return [*(type(one).technique for one in techniques), *others]


def ordered(techniques: list[TechniqueCallback], trainer: Trainer, at: str | None = None) -> list[TechniqueCallback]:
    """The techniques in the order in which they act at a seam, or at Lightning's hooks.

    Raises:
        ConflictError: some cannot be combined with each other, or with the strategy.
    """
    by_name = {type(one).technique.name: one for one in techniques}
    return [by_name[one.name] for one in compose.order(records(techniques, trainer), at) if one.name in by_name]


def check(techniques: list[TechniqueCallback], runs: dict[str, Run], trainer: Trainer, module: LightningModule) -> None:
    """Let each technique refuse a Trainer that cannot work with it.

    Raises:
        RunError: one cannot, as its record says; what its own ``check`` raises.
    """
    if any(run.fitting for run in runs.values()):
        strategies.check(techniques, trainer.strategy)
        if found := compose.refusals([*techniques, trainer.strategy, trainer.precision_plugin]):
            raise ConflictError(" ".join(found))
        beside.check(trainer.callbacks, records(techniques, trainer))
        _refuse_batch_size_finder(techniques, trainer)
        for note in beside.notes(trainer.callbacks):
            rank_zero_info(note)
    for technique in techniques:
        run = runs[type(technique).technique.name]
        if run.fitting:
            for need in type(technique).technique.needs:
                _NEEDS[need](technique, run)
    altering = [one for one in techniques if overrides(one, "alter_model") or overrides(one, "initialize")]
    user_shards = isinstance(trainer.strategy, ModelParallelStrategy) and is_overridden("configure_model", module)
    if altering and user_shards and not getattr(trainer.strategy, "shards_in_setup", False):
        raise RunError(
            f"{type(altering[0]).__name__} changes the model after configure_model, where "
            f"{type(module).__name__} has sharded it already. Use a strategy that shards by itself, or leave "
            "the technique out."
        )
    for technique in techniques:
        technique.check(runs[type(technique).technique.name])


def _refuse_batch_size_finder(techniques: list[TechniqueCallback], trainer: Trainer) -> None:
    chooses = [one for one in techniques if "samples" in type(one).technique.touches("replaces")]
    if chooses and any(isinstance(one, BatchSizeFinder) for one in trainer.callbacks):
        name = type(chooses[0]).__name__
        raise RunError(
            f"BatchSizeFinder runs a few steps before training and then resumes, and {name} would train on nothing: it "
            f"has chosen samples for the steps that were tried. Find the batch size without {name}, then give it."
        )


def seed(techniques: list[TechniqueCallback], trainer: Trainer) -> None:
    """Give each technique random numbers of its own, the same on all processes."""
    common = int(trainer.strategy.broadcast(torch.initial_seed()))  # read, not drawn: the user's stream stays
    for technique in techniques:
        if technique._generator is None:
            own = zlib.crc32(type(technique).technique.name.encode())
            technique._generator = torch.Generator().manual_seed((common ^ own) % 2**63)


def _automatic_optimization(technique: TechniqueCallback, run: Run) -> None:
    if not run.module.automatic_optimization:
        raise RunError(
            f"{type(technique).__name__} needs backward and the optimizer's step apart from training_step, in which "
            f"{type(run.module).__name__} does them by hand (automatic_optimization=False). Leave the technique out, "
            "or let Lightning optimize."
        )


def _sized_training_data(technique: TechniqueCallback, run: Run) -> None:
    if run.trainer.max_steps == -1 and run.trainer.max_epochs == -1:
        raise RunError(
            f"{type(technique).__name__} needs to know how long the run is, and this one has no end. "
            "Give Trainer(max_steps=...) or max_epochs=."
        )


_NEEDS = {
    "automatic optimization": _automatic_optimization,
    "one optimizer": _automatic_optimization,  # Lightning itself allows only one then
    "sized training data": _sized_training_data,
}
