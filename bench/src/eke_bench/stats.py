"""What a noisy machine allows to be said."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import process_time
from typing import Any

from eke import ArgumentError


@dataclass(frozen=True)
class Interval:
    """A value and what it may as well be."""

    value: float
    low: float
    high: float

    def __contains__(self, other: float) -> bool:
        return self.low <= other <= self.high


def bootstrap(values: Sequence[float], level: float = 0.95, draws: int = 2000) -> Interval:
    """The median of ``values`` with its bootstrap interval; the same values give the same interval.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ArgumentError("no values to take a median of. Give one or more.")
    source = random.Random(0)
    medians = sorted(statistics.median(source.choices(values, k=len(values))) for _ in range(draws))
    cut = int(draws * (1 - level) / 2)
    return Interval(statistics.median(values), medians[cut], medians[-cut - 1])


def paired_mean(differences: Sequence[float]) -> Interval:
    """Mean of paired differences with the 95 % interval of Student's t; endless for a single pair."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return Interval(mean, -math.inf, math.inf)
    reach = student_t(len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))
    return Interval(mean, mean - reach, mean + reach)


# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def student_t(freedom: int) -> float:
    """97.5 % quantile; above 15 degrees of freedom that of 15, which is the wider one."""
    return _T[min(freedom, len(_T)) - 1]


def cost_of_quality(curve: Sequence[tuple[float, float]], quality: float) -> Interval:
    """What a baseline had to spend for a quality, from fully decayed runs at several budgets.

    Args:
        curve: Points of (cost, quality), lower quality values being better.
        quality: To be bought.

    Returns:
        The cost, interpolated along the logarithm of cost. Beyond the curve it is not extrapolated: then ``value`` is
        the last cost on that side, and ``low`` or ``high`` are 0 or infinite to say that it is a bound.
    """
    points = _falling(curve)
    (cheapest, worst), (dearest, best) = points[0], points[-1]
    if quality < best:
        return Interval(dearest, dearest, math.inf)
    if quality > worst:
        return Interval(cheapest, 0.0, cheapest)
    for (cost, value), (later, lower) in pairwise(points):
        if lower <= quality <= value:
            share = 0.0 if value == lower else (value - quality) / (value - lower)
            found = math.exp(math.log(cost) + share * (math.log(later) - math.log(cost)))
            return Interval(found, found, found)
    return Interval(cheapest, cheapest, cheapest)  # a curve of one point, met exactly


def quality_at_cost(curve: Sequence[tuple[float, float]], cost: float) -> float | None:
    """What a baseline reached for a cost, interpolated along the logarithm of cost; None beyond the curve.

    A twentieth beyond either end still counts as the end.
    """
    points = sorted(curve)
    if not points[0][0] / 1.05 <= cost <= points[-1][0] * 1.05:
        return None
    cost = min(max(cost, points[0][0]), points[-1][0])
    for (left, value), (right, later) in pairwise(points):
        if left <= cost <= right:
            share = (math.log(cost) - math.log(left)) / (math.log(right) - math.log(left)) if right > left else 0.0
            return value + share * (later - value)
    return points[0][1]


def _falling(curve: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The curve by cost, with the best quality that had been reached by then."""
    points: list[tuple[float, float]] = []
    for cost, value in sorted(curve):
        points.append((cost, min(value, points[-1][1]) if points else value))
    return points


def performance_profile(ratios: Mapping[str, Mapping[str, float]], taus: Sequence[float]) -> dict[str, list[float]]:
    """Share of workloads on which each method is within a factor tau of the best one (Dolan and More 2002).

    Args:
        ratios: Method to workload to cost; a miss is infinite, and so is a workload that a method was not run on.
        taus: Factors, from 1.

    Returns:
        Method to its shares, one for each tau.
    """
    workloads = sorted({workload for costs in ratios.values() for workload in costs})
    best = {name: min(costs.get(name, math.inf) for costs in ratios.values()) for name in workloads}
    return {
        method: [
            statistics.fmean(
                costs.get(name, math.inf) <= tau * best[name] and math.isfinite(best[name]) for name in workloads
            )
            for tau in taus
        ]
        for method, costs in ratios.items()
    }


def interleaved(
    variants: Mapping[str, Callable[[], Any]], rounds: int = 40, clock: Callable[[], float] = process_time
) -> dict[str, dict[str, Any]]:
    """Time several functions in turn and compare each with the first, which runs twice as the A/A control.

    Args:
        variants: Name to function; the first is the baseline.
        rounds: Each calls every function once, in an order that turns around from round to round.
        clock: In seconds. On CUDA give one that waits for the device.

    Returns:
        Name to ``seconds`` (median), ``ratio`` (median of the ratios within a round, with its bootstrap interval as
        ``[value, low, high]``) and ``significant``: whether the interval lies outside that of the control. The control
        is listed under the name of the first with ``(again)``.
    """
    first = next(iter(variants))
    functions = {**variants, f"{first} (again)": variants[first]}
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(-2, rounds):
        for name in list(functions)[:: 1 if number % 2 else -1]:
            start = clock()
            functions[name]()
            if number >= 0:
                taken[name].append(clock() - start)
    ratios = {
        name: bootstrap([mine / base for mine, base in zip(times, taken[first], strict=True)])
        for name, times in taken.items()
    }
    control = ratios[f"{first} (again)"]
    return {
        name: {
            "seconds": statistics.median(taken[name]),
            "ratio": [ratio.value, ratio.low, ratio.high],
            "significant": name in variants and name != first and not overlap(ratio, control),
        }
        for name, ratio in ratios.items()
    }


def counted(number: int, noun: str) -> str:
    """``"1 seed"``, ``"3 seeds"``."""
    return f"{number} {noun}{'s' * (number != 1)}"


def overlap(one: Interval, other: Interval) -> bool:
    return one.low <= other.high and other.low <= one.high
