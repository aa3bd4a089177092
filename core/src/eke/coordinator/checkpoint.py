"""What the techniques of a run keep in a checkpoint, written and read in their order.

The tricks it hides: Lightning warns of a callback that has a state in the checkpoint and is missing from the Trainer,
so that a file without any technique left to object still says what it was written with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.utils.data import IterableDataset

from eke import compat
from eke.coordinator import arguments
from eke.coordinator.opening import overrides
from eke.refusal import RunError
from eke.seams import shards, state
from eke.seams.masks import Masks
from eke.seams.progress import Progress
from eke.seams.standing import Standing
from eke.seams.swap import Swap
from eke.spec import EkeError, ResumeError
from eke.strategies import arguments_of

if TYPE_CHECKING:
    from eke.technique import TechniqueCallback

# What an optimizer's state goes by: with a technique more or less that touches it, the state cannot be read on.
_STATES = ("module tree", "optimizer", "optimizer state")

_WILLING = (
    "To go on all the same, as another run, set on_changed_arguments = 'warn' on the technique, or give it to "
    "eke.trainer_kwargs."
)
_EXACT = "By its record the numbers stay as they are."
_ANEW = "begin a new run from the checkpoint's weights (load_from_checkpoint, then fit without ckpt_path)"


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
            "arguments": arguments.of(technique),
            "effects": list(type(technique).technique.effects),
            "exactness": _exactness(technique),
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
    if "callbacks" in checkpoint:
        for name, key in _marks(techniques):
            if entries[name]["exactness"] != "exact" or entries[name]["manifest"]:
                checkpoint["callbacks"][key] = {}
                checkpoint[state.KEY].setdefault("marks", []).append(key)


def read(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Eke's own part of a checkpoint; None in one that was written without Eke.

    Raises:
        ResumeError: of a later version, or not whole.
    """
    if state.KEY not in checkpoint:
        return None
    own = checkpoint[state.KEY]
    parts = {"version": int, "progress": Mapping, "techniques": Mapping}
    lacks = [key for key, kind in parts.items() if not isinstance(own, Mapping) or not isinstance(own.get(key), kind)]
    if not lacks and own["version"] > state.VERSION:
        raise ResumeError(
            f"the checkpoint is of version {own['version']} of Eke's part, and the installed eke reads up to "
            f"{state.VERSION}. Update eke, or {_ANEW}."
        )
    entries = own["techniques"] if not lacks else {}
    lacks += [
        f"techniques[{name!r}][{key!r}]"
        for name, entry in entries.items()
        for key in ("version", "manifest", "state", "generator")
        if not isinstance(entry, Mapping) or key not in entry
    ]
    if lacks:
        raise ResumeError(
            f"the checkpoint's part of Eke, checkpoint[{state.KEY!r}], is not whole: it has no {', '.join(lacks)}. "
            f"Something has written over it. Take another file, or {_ANEW}."
        )
    return own


def note_data(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Put in how many samples each train loader's data has, and whether the file is of the middle of an epoch."""
    combined = compat.combined_loader(trainer)
    sizes = [] if combined is None else [_samples(one) for one in combined.flattened]
    checkpoint[state.KEY]["data"] = {"samples": sizes, "within": compat.batches_done(trainer) > 0}


def check_data(own: Mapping[str, Any], loader: Any, number: int) -> None:
    """Refuse data of another size in the middle of an epoch, whose order goes by it; warn at an epoch's end.

    Args:
        own: As :func:`read` gave it.
        loader: A train loader of the run that resumes, before it is read.
        number: Its place among them.

    Raises:
        ResumeError: the run would go on in the middle of an epoch that is not there.
    """
    sizes = own.get("data", {}).get("samples", [])
    before, now = sizes[number] if number < len(sizes) else None, _samples(loader)
    if before is None or now is None or before == now:
        return
    if own["data"]["within"]:
        raise ResumeError(
            f"the checkpoint was written in the middle of an epoch of {before} samples, and the data has {now}: what "
            f"is left of the epoch is not known. Train on the same data, resume from an epoch's end, or {_ANEW}."
        )
    rank_zero_warn(f"Eke: the checkpoint was written with {before} samples, and this run has {now}.")


def _samples(loader: Any) -> int | None:
    data = getattr(loader, "dataset", None)
    if not isinstance(data, Sized) or isinstance(data, IterableDataset):
        return None
    try:
        return len(data)
    except (TypeError, NotImplementedError):  # a length that it does not know
        return None


def take_back(checkpoint: dict[str, Any]) -> None:
    """Make Lightning's part what it is to a Trainer with Eke: without the words for one that has none."""
    for key in checkpoint[state.KEY].get("marks", []):
        checkpoint.get("callbacks", {}).pop(key, None)


def compare(own: Mapping[str, Any] | None, techniques: list[TechniqueCallback]) -> None:
    """Say what is otherwise than when the checkpoint was written, and refuse a run that would go on as another.

    A technique whose record says "exact" may come, go and change, with a warning: the run's numbers stay.

    Args:
        own: As :func:`read` gave it.
        techniques: Of the run that resumes.

    Raises:
        ResumeError: a technique that refuses it, or whose state cannot be read on.
    """
    saved = {} if own is None else own["techniques"]
    here = {type(one).technique.name: one for one in techniques}
    wishes = {name: _wish(one) for name, one in here.items()}
    never: list[str] = []
    unasked: list[str] = []  # where nobody has said that it may
    said: list[str] = []

    def ask(words: str, wish: str) -> None:
        (unasked if wish == "refuse" else said).append(words)

    for name, entry in saved.items():
        if name in here:
            continue
        words = f"the checkpoint was written with {name!r}, which this Trainer does not have."
        if entry["manifest"] or _shapes_states(entry.get("effects", ())):
            never.append(f"{words} Add it to callbacks=: what it has changed cannot be read on without it.")
        elif entry.get("exactness") == "exact":
            said.append(f"{words} {_EXACT}")
        else:
            agreed = bool(here) and "refuse" not in wishes.values()
            ask(f"{words} Add it to callbacks=, or the run would not go on as it was.", "warn" if agreed else "refuse")
    for name, technique in here.items():
        record = type(technique).technique
        if name not in saved:
            words = f"the checkpoint was written without {name!r}, which this Trainer has."
            if technique.joins:
                said.append(f"{words} It takes up what there is.")
            elif _shapes_states(record.effects):
                never.append(f"{words} What it changes was not there: leave it out, or {_ANEW}.")
            elif _exactness(technique) == "exact":
                said.append(f"{words} {_EXACT}")
            else:
                ask(f"{words} Leave it out, or {_ANEW}.", wishes[name])
            continue
        for argument, (before, after) in _changed(technique, saved[name]).items():
            was, now = arguments.written(argument, before, after)
            kind = type(technique).__name__
            words = f"the checkpoint was written with {kind}({was}), and this run has {kind}({now})."
            if argument in technique.must_not_change:
                never.append(f"{words} Its state cannot be read on: give {was}, or {_ANEW}.")
            elif _exactness(technique) == "exact":
                said.append(f"{words} {_EXACT}")
            else:
                ask(f"{words} Give {was}, or the run would not go on as it was.", wishes[name])
    if never or unasked:
        raise ResumeError(" ".join([*never, *unasked, *([] if never else [_WILLING])]))
    for words in said:
        rank_zero_warn(f"Eke: {words}")


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
        ResumeError: what has reshaped the model is not here, or cannot read what it has saved.
        MisconfigurationException: a strategy that loads weights after it has sharded the model.
    """
    own = checkpoint[state.KEY]
    _refuse_missing(own["techniques"], techniques)
    for technique in techniques:
        manifest = own["techniques"].get(type(technique).technique.name, {}).get("manifest")
        if manifest is not None:
            _refuse_late_shape(technique, trainer)
            with _reading(technique):
                technique.shape_from(manifest, module)
    for technique in techniques:
        if overrides(technique, "complete_checkpoint"):
            with _reading(technique):
                technique.complete_checkpoint(checkpoint, module)
    weights = checkpoint.get("state_dict")
    if trainer is not None and isinstance(weights, dict):
        weights.update(own.get("training_weights", {}).get("tensors", {}))


def restore(own: dict[str, Any], techniques: list[TechniqueCallback], progress: Progress, masks: Masks | None) -> None:
    """Give progress, techniques and masks their state back.

    Raises:
        ResumeError: a state that the installed technique cannot read.
    """
    progress.load_state_dict(own["progress"])
    if masks is not None:
        masks.load_state_dict(own.get("masks", {}))
    for technique in techniques:
        entry = own["techniques"].get(type(technique).technique.name)
        if entry is None:
            continue
        if entry["version"] > technique.version:
            raise ResumeError(
                f"the checkpoint holds {type(technique).technique.name!r} state of version {entry['version']}, and "
                f"the installed one reads up to {technique.version}. Update its distribution."
            )
        with _reading(technique):
            technique.generator.set_state(entry["generator"])
            technique.load_state_dict(entry["state"])


def restore_rank(here: dict[str, Any], techniques: list[TechniqueCallback]) -> None:
    """Give each technique what it had in this process, in place of what it had in the one that wrote the file."""
    for technique in techniques:
        if (own := here.get("states", {}).get(type(technique).technique.name)) is not None:
            with _reading(technique):
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


def _refuse_missing(saved: Mapping[str, Any], techniques: list[TechniqueCallback]) -> None:
    here = {type(one).technique.name for one in techniques}
    missing = [name for name, entry in saved.items() if name not in here and entry["manifest"]]
    if missing:
        raise ResumeError(
            f"the checkpoint was written with {', '.join(map(repr, missing))}, which has changed the model's shape. "
            "Add it to callbacks=: this Trainer does not have it."
        )


@contextmanager
def _reading(technique: TechniqueCallback) -> Iterator[None]:
    """Name the technique in an error that is Python's or torch's."""
    try:
        yield
    except (EkeError, MisconfigurationException):
        raise
    except Exception as error:
        name, kind = type(technique).technique.name, type(error).__name__
        what = str(error) if isinstance(error, ValueError) else f"{kind}: {error}"
        raise ResumeError(f"{name!r} cannot go on from what this checkpoint holds of it: {what}") from error


def _changed(technique: TechniqueCallback, entry: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Arguments that are others than the checkpoint's, of those that matter to a resumed run."""
    if "arguments" not in entry:  # written before Eke kept them
        return {}
    found = arguments.changed(technique, entry["arguments"])
    return {name: values for name, values in found.items() if name not in technique.may_change}


def _exactness(technique: TechniqueCallback) -> str:
    return type(technique).technique.exactness_of(arguments_of(technique))


def _wish(technique: TechniqueCallback) -> str:
    wish = technique.on_changed_arguments
    if wish not in ("refuse", "warn"):
        raise EkeError(f"on_changed_arguments={wish!r} of {type(technique).__name__}: give 'refuse' or 'warn'.")
    return wish


def _shapes_states(effects: Iterable[str]) -> bool:
    """Whether an optimizer's state, or the model's, is another one with a technique than without it."""
    return any(effect == f"{verb} {one}" for effect in effects for verb in ("replaces", "changes") for one in _STATES)


def _marks(techniques: list[TechniqueCallback]) -> Iterator[tuple[str, str]]:
    """Each technique's name, and the words that stand for it among the states of callbacks."""
    for technique in techniques:
        kind, record = type(technique), type(technique).technique
        yield record.name, f"{kind.__module__.partition('.')[0]}.{kind.__name__} (of Eke)"


def _refuse_late_shape(technique: TechniqueCallback, trainer: Trainer | None) -> None:
    if trainer is not None and trainer.strategy.restore_checkpoint_after_setup:
        raise RunError(
            f"{type(technique).__name__} has to change the model's shape before weights load, and "
            f"{type(trainer.strategy).__name__} loads them after sharding it. Resume on one device or with "
            "strategy='ddp'."
        )
