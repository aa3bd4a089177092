"""The tensors of a batch, in whatever containers a person or a tokenizer put them.

The trick it hides: a batch may be a tensor, a tuple with or without names, a list, or a mapping of a class of its own,
and a changed one has to be of the same kind, or the user's ``training_step`` breaks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


def tensors(batch: Any) -> Iterator[Tensor]:
    """Every tensor of a batch, in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for part in batch.values():
            yield from tensors(part)
    elif isinstance(batch, (list, tuple)):
        for part in batch:
            yield from tensors(part)


def mapped(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The batch with every tensor changed, in containers of the same kind."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        changed = copy.copy(batch)  # a tokenizer's own mapping stays one
        for name, part in batch.items():
            changed[name] = mapped(part, change)
        return changed
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(mapped(part, change) for part in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(mapped(part, change) for part in batch)
    return batch


def replaced(batch: Any, old: Tensor, new: Tensor) -> Any:
    """The batch with one tensor in place of another."""
    return mapped(batch, lambda tensor: new if tensor is old else tensor)
