"""Learning-rate schedules: scaled with their optimizer, replaced, added or left out.

The tricks it hides: most schedules keep the base rate that they found when they were built, so that a rate changed
afterwards is forgotten at their first step; some keep theirs in the optimizer's groups, some inside other schedules;
and ``configure_optimizers`` has half a dozen return forms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from eke import compat
from eke.seams.optimizer import each_scheduler

_RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # those that schedules keep in a group
_BASES = ("base_lrs", "max_lrs", "_last_lr")  # and in themselves


def scale_group(group: dict[str, Any], factor: float) -> None:
    """Scale the rates of a parameter group. Schedules that are bound to it follow in :func:`carry`."""
    for name in _RATES:
        if name in group:
            group[name] = group[name] * factor
    group["eke_lr_factor"] = group.get("eke_lr_factor", 1.0) * factor


def rates(optimizer: Optimizer) -> list[float]:
    """The learning rate of each group, as numbers."""
    return [float(group["lr"]) for group in optimizer.param_groups]


def carry(schedulers: list[Any], optimizer: Optimizer, before: list[float]) -> None:
    """Let the schedules of an optimizer go on from rates that have been changed.

    Args:
        schedulers: torch's, of all optimizers; only those bound to ``optimizer`` change.
        optimizer: Whose groups were scaled by :func:`scale_group`, or had their ``lr`` changed.
        before: Their rates as they were, which the schedules were built on.
    """
    same = len(before) == len(optimizer.param_groups)
    for number, group in enumerate(optimizer.param_groups):
        factor = group.pop("eke_lr_factor", None)
        if factor is None:  # changed without a word: told from the rate, which a warm-up may have at 0
            changed = same and before[number] and float(group["lr"]) != before[number]
            factor = float(group["lr"]) / before[number] if changed else 1.0
            for name in _RATES[1:] if factor != 1.0 else ():
                if name in group:
                    group[name] = group[name] * factor
        if factor != 1.0:
            for scheduler in (inner for one in schedulers for inner in each_scheduler(one)):
                if getattr(scheduler, "optimizer", None) is optimizer:
                    _scale(scheduler, number, factor)


def map_schedulers(
    returned: Any, change: Callable[[list[Optimizer], list[dict[str, Any]]], list[Mapping[str, Any]]]
) -> Any:
    """Replace the schedules in what ``configure_optimizers`` returned, in whatever form.

    Args:
        returned: What it returned.
        change: Optimizers and schedules to schedules. Each is a mapping as Lightning takes it: ``"scheduler"``,
            ``"interval"``, ``"frequency"``, ``"monitor"`` ...
    """
    if returned is None:
        return None
    optimizers, configs = compat.parse_schedulers(returned)
    return optimizers, [dict(config) for config in change(optimizers, configs)]


def _scale(scheduler: Any, number: int, factor: float) -> None:
    for name in _BASES:
        values = getattr(scheduler, name, None)
        if isinstance(values, (list, tuple)) and number < len(values):
            scaled = list(values)
            scaled[number] = scaled[number] * factor
            if name == "_last_lr" and isinstance(scaled[number], torch.Tensor):
                scaled[number] = scaled[number].clone()
            setattr(scheduler, name, scaled)
