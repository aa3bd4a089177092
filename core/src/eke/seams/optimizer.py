"""Replace or wrap what ``configure_optimizers`` returned, and carry state from one optimizer to another.

The tricks it hides: ``configure_optimizers`` has half a dozen return forms; a scheduler keeps a pointer to the
optimizer it was built with, and one left behind means a learning rate that never changes; torch marks
``optimizer.step`` when a scheduler is built and warns about an optimizer without the mark. Of the four places
where an optimizer could be swapped this is the only one that DeepSpeed sees too.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from eke import compat
from eke.seams.wrapped import inner_of
from eke.spec import ArgumentError


def map_optimizers(returned: Any, change: Callable[[Optimizer], Optimizer]) -> Any:
    """Apply ``change`` to every optimizer in what ``configure_optimizers`` returned, in whatever form.

    Schedulers are pointed at the new optimizers. The form of ``returned`` is kept.
    """
    if returned is None:
        return None
    optimizers, schedulers = compat.parse_optimizers(returned)
    changed = {id(old): change(old) for old in optimizers}
    rebind(schedulers, changed)
    return _substitute(returned, changed)


def rebind(schedulers: Iterable[Any], new: Mapping[int, Optimizer]) -> None:
    """Point schedulers at other optimizers.

    Args:
        schedulers: torch schedulers, also those that hold others (``SequentialLR``, ``ChainedScheduler``), or
            Lightning's scheduler configs.
        new: ``id`` of an optimizer to the one that takes its place.
    """
    for item in schedulers:
        for scheduler in each_scheduler(getattr(item, "scheduler", item)):
            replacement = new.get(id(getattr(scheduler, "optimizer", None)))
            if replacement is not None:
                scheduler.optimizer = replacement
                _mark_step(replacement)


def transplant(old: Optimizer, new: Optimizer, origin: Mapping[torch.Tensor, torch.Tensor]) -> None:
    """Carry settings and per-parameter state of ``old`` over to ``new``, in place.

    Args:
        old: Optimizer of the model as it was.
        new: Optimizer of the model as it is, with as many groups. Its settings are overwritten: a schedule goes
            on where it was.
        origin: New parameter to the old one whose state it takes, as a copy. A parameter that is in both keeps
            its own; one in neither starts without state.

    Raises:
        ValueError: the numbers of parameter groups differ.
    """
    if len(old.param_groups) != len(new.param_groups):
        raise ArgumentError(
            f"{type(new).__name__} has {len(new.param_groups)} parameter groups after the change and had "
            f"{len(old.param_groups)} before: configure_optimizers must build as many groups for any depth. "
            "Group parameters by kind, not by layer."
        )
    for before, after in zip(old.param_groups, new.param_groups, strict=True):
        after.update({key: value for key, value in before.items() if key not in ("params", "param_names")})
    for group in new.param_groups:
        for parameter in group["params"]:
            source = parameter if parameter in old.state else origin.get(parameter)
            if source is not None and source in old.state:
                state = old.state[source]
                new.state[parameter] = state if source is parameter else _copy(state)
    inner_old, inner_new = inner_of(old), inner_of(new)
    if inner_old is not None and inner_new is not None:
        transplant(inner_old, inner_new, origin)


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return value


def _substitute(value: Any, changed: Mapping[int, Optimizer]) -> Any:
    if id(value) in changed:
        return changed[id(value)]
    if isinstance(value, dict) and "optimizer" in value:
        return {key: _substitute(item, changed) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_substitute(item, changed) for item in value)
    return value


def each_scheduler(scheduler: Any) -> Iterator[Any]:
    """A schedule and those inside it."""
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from each_scheduler(inner)


def _mark_step(optimizer: Optimizer) -> None:
    """Put torch's marker on ``step``, or the scheduler warns that it was called before the optimizer."""
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        return
    original = optimizer.step.__func__

    @functools.wraps(original)
    def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        self._opt_called = True
        return original(self, *args, **kwargs)

    step._wrapped_by_lr_sched = True
    optimizer.step = types.MethodType(step, optimizer)
