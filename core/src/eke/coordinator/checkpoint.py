"""What the techniques of a run keep in a checkpoint, written and read in their order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from eke import compat
from eke.coordinator.opening import overrides
from eke.seams import shards, state
from eke.seams.masks import Masks
from eke.seams.progress import Progress
from eke.seams.standing import Standing
from eke.seams.swap import Swap
from eke.spec import ConflictError

if TYPE_CHECKING:
    from eke.technique import TechniqueCallback


def write(
    checkpoint: dict[str, Any],
    techniques: list[TechniqueCallback],
    progress: Progress,
    swap: Swap | None,
    masks: Masks | None,
) -> None:
    """Put in the progress, and each technique's manifest, state and random generator."""
    entries = {}
    for technique in techniques:
        name = type(technique).technique.name
        entry = {
            "version": technique.version,
            "manifest": technique.manifest(),
            "state": technique.state_dict(),
            "generator": technique.generator.get_state(),
        }
        state.check_plain(entry, f"state of {name}")
        entries[name] = entry
    checkpoint[state.KEY] = {"version": state.VERSION, "progress": progress.state_dict(), "techniques": entries}
    compat.forget_empty_loader_states(checkpoint)  # a Trainer without Eke can go on from it as well
    if masks is not None and (claimed := masks.state_dict()):
        checkpoint[state.KEY]["masks"] = claimed
    _write_eval_weights(checkpoint, eval_weights(techniques), swap, None if masks is None else masks.module)
    for technique in techniques:
        technique.alter_checkpoint(checkpoint)


def write_past(checkpoint: dict[str, Any], past: dict[str, Any]) -> None:
    """Put in what techniques, the progress and buffers were at a moment that is past, in place of what they are now."""
    own, others = checkpoint[state.KEY], past["others"]
    own["progress"] = {**own["progress"], **others["progress"]}
    for name, entry in own["techniques"].items():
        entry["state"] = others["states"].get(name, entry["state"])
        entry["generator"] = others["generators"].get(name, entry["generator"])
    weights = checkpoint["state_dict"]
    buffers = {
        name: one for name, one in past["buffers"].items() if name in weights and one.shape == weights[name].shape
    }
    checkpoint["state_dict"] = {**weights, **buffers}


def write_ranks(
    checkpoint: dict[str, Any], techniques: list[TechniqueCallback], trainer: Trainer, standing: Standing,
    past: dict[str, Any] | None,
) -> None:  # fmt: skip
    """Put in what each process has of its own: where it stands, random state, data, a window that is cut in two; and of
    several processes the techniques' states, which may hold what a process has noted of its own samples."""
    here = standing.state_dict(past)
    if trainer.world_size > 1:
        states = {type(one).technique.name: one.state_dict() for one in techniques}
        states.update({} if past is None else past["others"]["states"])
        here = {**here, "states": {name: one for name, one in states.items() if one}}
    checkpoint[state.KEY]["ranks"] = state.gather(trainer, here)


def go_on(checkpoint: dict[str, Any], here: dict[str, Any], standing: Standing) -> None:
    """Let the run go on where this process stood; Lightning reads its own part of the checkpoint after this."""
    loops = checkpoint["loops"]
    checkpoint["loops"] = {**loops, "fit_loop": standing.load_state_dict(here, loops["fit_loop"])}


def shape(
    checkpoint: dict[str, Any], techniques: list[TechniqueCallback], module: LightningModule, trainer: Trainer | None
) -> None:
    """Before weights load: build the module tree that was saved, and complete what was left out.

    Raises:
        ConflictError: the checkpoint was written with techniques that are not here.
        MisconfigurationException: a strategy that loads weights after it has sharded the model.
    """
    own = checkpoint[state.KEY]
    _refuse_missing(own["techniques"], techniques, fitting=trainer is not None)
    for technique in techniques:
        manifest = own["techniques"].get(type(technique).technique.name, {}).get("manifest")
        if manifest is not None:
            _refuse_late_shape(technique, trainer)
            technique.shape_from(manifest, module)
    for technique in techniques:
        if overrides(technique, "complete_checkpoint"):
            technique.complete_checkpoint(checkpoint, module)
    weights = checkpoint.get("state_dict")
    if trainer is not None and isinstance(weights, dict):
        weights.update(own.get("training_weights", {}).get("tensors", {}))
    if trainer is not None and isinstance(trainer.precision_plugin, DoublePrecision):
        module.double()  # Lightning does so after weights have loaded: a module of float32 would round them


def restore(own: dict[str, Any], techniques: list[TechniqueCallback], progress: Progress, masks: Masks | None) -> None:
    """Give progress, techniques and masks their state back.

    Raises:
        ConflictError: a state of a version that the installed technique cannot read.
    """
    progress.load_state_dict(own["progress"])
    if masks is not None:
        masks.load_state_dict(own.get("masks", {}))
    for technique in techniques:
        entry = own["techniques"].get(type(technique).technique.name)
        if entry is None:
            continue
        if entry["version"] > technique.version:
            raise ConflictError(
                f"the checkpoint holds {type(technique).technique.name!r} state of version {entry['version']}, and "
                f"the installed one reads up to {technique.version}. Update its distribution."
            )
        technique.generator.set_state(entry["generator"])
        technique.load_state_dict(entry["state"])


def restore_rank(here: dict[str, Any], techniques: list[TechniqueCallback]) -> None:
    """Give each technique what it had in this process, in place of what it had in the one that wrote the file."""
    for technique in techniques:
        if (own := here.get("states", {}).get(type(technique).technique.name)) is not None:
            technique.load_state_dict(own)


def rank_of(own: dict[str, Any], trainer: Trainer) -> dict[str, Any] | None:
    """What this process had of its own; None where there were more or fewer processes, which is said."""
    ranks = own["ranks"]
    if len(ranks) == trainer.world_size:
        return ranks[trainer.global_rank]
    rank_zero_info(
        f"Eke: the checkpoint was written by {len(ranks)} processes and this run has {trainer.world_size}: "
        "training goes on at the saved step, with the data order and random numbers of a new epoch."
    )
    return None


def eval_weights(techniques: list[TechniqueCallback]) -> Mapping[str, torch.Tensor] | None:
    """Weights for validation and saving; only one technique may replace them."""
    return next((weights for one in techniques if (weights := one.eval_weights()) is not None), None)


def _write_eval_weights(
    checkpoint: dict[str, Any], weights: Mapping[str, torch.Tensor] | None, swap: Swap | None, module: nn.Module | None
) -> None:
    """Save what is evaluated in place of what is trained, which goes beside it. Sharded weights are saved as the
    strategy saves the model's: in parts, or whole."""
    if weights is None or module is None:
        return
    if "optimizer_states" in checkpoint:
        training = Swap(module).values(weights) if swap is None else swap.kept
        checkpoint[state.KEY]["training_weights"] = shards.save_parts(checkpoint, "training", training)
    if not shards.is_sharded(checkpoint["state_dict"].values()):
        weights = {name: shards.whole(one) for name, one in weights.items()}
    checkpoint["state_dict"] = {**checkpoint["state_dict"], **weights}


def put_training_weights(own: dict[str, Any], trainer: Trainer, module: LightningModule) -> None:
    """Give the module the weights that were trained, where the strategy has loaded those that were evaluated already,
    or each process its part."""
    training = own.get("training_weights")
    if training is not None and ("sharded" in training or trainer.strategy.restore_checkpoint_after_setup):
        swap = Swap(module)
        like = swap.values(training.get("tensors") or training["sharded"])
        swap.put(shards.load_parts(training, like, trainer.ckpt_path))


def _refuse_missing(saved: Mapping[str, Any], techniques: list[TechniqueCallback], fitting: bool) -> None:
    here = {type(one).technique.name for one in techniques}
    missing = [name for name, entry in saved.items() if name not in here and (fitting or entry["manifest"])]
    if missing:
        raise ConflictError(
            f"the checkpoint was written with {', '.join(map(repr, missing))}, which this Trainer does not have. "
            "Add it to callbacks=, or the run would not go on as it was."
        )


def _refuse_late_shape(technique: TechniqueCallback, trainer: Trainer | None) -> None:
    if trainer is not None and trainer.strategy.restore_checkpoint_after_setup:
        raise MisconfigurationException(
            f"{type(technique).__name__} has to change the model's shape before weights load, and "
            f"{type(trainer.strategy).__name__} loads them after sharding it. Resume on one device or with "
            "strategy='ddp'."
        )
