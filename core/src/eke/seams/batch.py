"""The tensors of a batch, in whatever containers a person or a tokenizer put them.

The trick it hides: a batch may be a tensor, a tuple with or without names, a list, a dataclass, or a mapping of a class
of its own, and a changed one has to be of the same kind, or the user's ``training_step`` breaks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from eke.spec import EkeError, NoEffectWarning


class BatchError(EkeError, ValueError):
    """Which rows of a batch belong to which sample is not known."""


def named_parts(batch: Any) -> dict[str, Any] | None:
    """The parts of a mapping or a dataclass by name; None for anything else."""
    if isinstance(batch, Mapping):
        return dict(batch.items())
    if is_dataclass(batch) and not isinstance(batch, type):
        return {one.name: getattr(batch, one.name) for one in fields(batch)}
    return None


def with_parts(batch: Any, parts: Mapping[str, Any]) -> Any:
    """A copy of a mapping or a dataclass, of the same class, with these parts in place of its own."""
    changed = copy.copy(batch)  # a tokenizer's own mapping stays one
    for name, part in parts.items():
        if isinstance(batch, Mapping):
            changed[name] = part
        else:
            object.__setattr__(changed, name, part)  # it may be frozen
    return changed


def tensors(batch: Any) -> Iterator[Tensor]:
    """Every tensor of a batch, in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif (parts := named_parts(batch)) is not None:
        for part in parts.values():
            yield from tensors(part)
    elif isinstance(batch, (list, tuple)):
        for part in batch:
            yield from tensors(part)


def mapped(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The batch with every tensor changed, in containers of the same kind."""
    if isinstance(batch, Tensor):
        return change(batch)
    if (parts := named_parts(batch)) is not None:
        return with_parts(batch, {name: mapped(part, change) for name, part in parts.items()})
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(mapped(part, change) for part in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(mapped(part, change) for part in batch)
    return batch


def replaced(batch: Any, old: Tensor, new: Tensor) -> Any:
    """The batch with one tensor in place of another."""
    return mapped(batch, lambda tensor: new if tensor is old else tensor)


def size(batch: Any) -> int:
    """Samples of a batch: the first size that all of its tensors share.

    Raises:
        BatchError: they share none.
    """
    sizes = sorted({len(one) for one in tensors(batch) if one.ndim})
    if len(sizes) != 1:
        raise BatchError(
            f"The tensors of a batch have first sizes {sizes}: which rows belong to a sample is not known. Let the "
            "collate function give every tensor one row for each sample."
        )
    return sizes[0]


def part_of(samples: int, keep: float, who: str) -> int:
    """How many of the samples of a batch are ``keep`` of them: the rounded number, and one at least.

    Warns:
        NoEffectWarning: those are all, though fewer were asked for.
    """
    count = max(1, round(keep * samples))
    if count == samples and keep < 1:
        rank_zero_warn(
            f"{who}(keep={keep}) takes all of a batch of {samples} {'sample' if samples == 1 else 'samples'}: there is "
            f"nothing to choose from. Give larger batches, or leave {who} out.",
            category=NoEffectWarning,
        )
    return count


def rows(batch: Any, chosen: Tensor) -> Any:
    """The batch of these samples alone, in this order, in containers of the same kind.

    Lists of anything but tensors, such as texts, are taken as one entry for each sample.

    Args:
        batch: As the loader gave it.
        chosen: int64; a sample may come several times.

    Raises:
        BatchError: sizes differ, see :func:`size`, or a list is not as long as the batch.
    """
    samples, numbers = size(batch), chosen.tolist()

    def take(part: Any) -> Any:
        if isinstance(part, Tensor):
            return part.index_select(0, chosen.to(part.device)) if part.ndim else part
        if (named := named_parts(part)) is not None:
            return with_parts(part, {name: take(one) for name, one in named.items()})
        if isinstance(part, tuple) and hasattr(part, "_fields"):
            return type(part)(*map(take, part))
        if isinstance(part, (list, tuple)):
            if any(isinstance(one, (Tensor, list, tuple)) or named_parts(one) is not None for one in part):
                return type(part)(map(take, part))
            if len(part) != samples:
                raise BatchError(f"A batch of {samples} samples holds a list of {len(part)} entries: whose are they?")
            return type(part)(part[number] for number in numbers)
        return part

    return take(batch)
