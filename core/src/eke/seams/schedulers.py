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
from eke.spec import EkeError

_RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # those that schedules keep in a group
_BASES = ("base_lrs", "max_lrs", "_last_lr")  # and in themselves
_BY_GROUP = (*_BASES, "lr_lambdas", "min_lrs", "base_momentums", "max_momentums")


class SchedulersError(EkeError, ValueError):
    """A schedule that cannot follow its optimizer."""


def scale_group(group: dict[str, Any], factor: float) -> None:
    """Scale the rates of a parameter group. Schedules that are bound to it follow in :func:`carry`."""
    for name in _RATES:
        if name in group:
            group[name] = group[name] * factor
    group["eke_lr_factor"] = group.get("eke_lr_factor", 1.0) * factor


def rates(optimizer: Optimizer) -> list[tuple[float, float]]:
    """Of each group the learning rate, and the one that it began with, before schedules made it what it is."""
    return [(float(group["lr"]), float(group.get("initial_lr", group["lr"]))) for group in optimizer.param_groups]


def carry(schedulers: list[Any], optimizer: Optimizer, before: list[tuple[float, float]]) -> None:
    """Let the schedules of an optimizer go on from rates that have been changed, also where it was replaced by one with
    a rate of its own or with other groups.

    Args:
        schedulers: torch's, of all optimizers; only those bound to ``optimizer`` change.
        optimizer: Whose groups were scaled by :func:`scale_group`, had their ``lr`` changed, or are new.
        before: :func:`rates` of the one that the schedules were built on.

    Raises:
        SchedulersError: other groups than before, where each had a schedule of its own.
    """
    inner = [one for outer in schedulers for one in each_scheduler(outer)]
    bound = [one for one in inner if getattr(one, "optimizer", None) is optimizer]
    groups = optimizer.param_groups
    for scheduler in bound:
        _spread(scheduler, len(before), len(groups))
    for number, group in enumerate(groups):
        scaled = group.pop("eke_lr_factor", None)
        rate, began = before[number] if len(before) == len(groups) else before[0]
        if bound and "initial_lr" not in group:  # an optimizer of its own: its rate is what a schedule scales
            base = float(group["lr"])
            factor = base / began if began else 1.0
            group["initial_lr"] = base
            group["lr"] = base * rate / began if began else base
        elif scaled is not None:
            factor = scaled
        else:  # changed without a word: told from the rate, which a warm-up may have at 0
            factor = float(group["lr"]) / rate if rate and float(group["lr"]) != rate else 1.0
            for name in _RATES[1:] if factor != 1.0 else ():
                if name in group:
                    group[name] = group[name] * factor
        if factor != 1.0:
            for scheduler in bound:
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


def _spread(scheduler: Any, before: int, now: int) -> None:
    """A schedule of one group for several, or of equal ones for another number."""
    if before == now:
        return
    for name, values in list(vars(scheduler).items()):
        if isinstance(values, list) and len(values) == before and name in _BY_GROUP:
            if any(value is not values[0] and value != values[0] for value in values):
                raise SchedulersError(
                    f"{type(scheduler).__name__} was built for {before} parameter groups with rates of their own, and "
                    f"the optimizer in place of theirs has {now}. Give it as many groups, or replace the schedule too, "
                    "in alter_schedulers."
                )
            setattr(scheduler, name, [values[0]] * now)


def _scale(scheduler: Any, number: int, factor: float) -> None:
    for name in _BASES:
        values = getattr(scheduler, name, None)
        if isinstance(values, (list, tuple)) and number < len(values):
            scaled = list(values)
            scaled[number] = scaled[number] * factor
            if name == "_last_lr" and isinstance(scaled[number], torch.Tensor):
                scaled[number] = scaled[number].clone()
            setattr(scheduler, name, scaled)
