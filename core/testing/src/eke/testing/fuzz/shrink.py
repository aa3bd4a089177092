"""Makes a case that fails smaller: fewer techniques, fewer arguments, plainer options, a plainer model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from eke.testing.fuzz.case import Case
from eke.testing.fuzz.execute import Outcome, try_case
from eke.testing.fuzz.subjects import SHAPES

NOTHING = "eke.testing.fuzz.nothing:Nothing"


def shrink(
    case: Case, found: Outcome, seconds: float = 60.0, attempt: Callable[[Case], Outcome] = try_case
) -> tuple[Case, Outcome]:
    """The smallest case reached that fails as well, and how it fails.

    One thing is taken away at a time, for good where the rest still fails, until nothing more can go. Differing and
    raising are two faults: a case that differs is not shrunk to one that raises.

    Args:
        case: What fails.
        found: How.
        seconds: After which the smallest so far is good enough.
        attempt: Runs a case.
    """
    end = time.monotonic() + seconds
    smaller = True
    while smaller:
        smaller = False
        for candidate in _smaller(case):
            if time.monotonic() > end:
                return case, found
            outcome = attempt(candidate)
            if _family(outcome) == _family(found):
                case, found, smaller = candidate, outcome, True
                break
    return case, found


def _family(outcome: Outcome) -> str:
    return outcome.kind.partition(":")[0]


def _smaller(case: Case) -> Iterator[Case]:
    """Cases with one thing less, those first that take most away."""
    techniques = dict(case.techniques)
    if set(techniques) != {NOTHING}:
        yield case.but(techniques={NOTHING: {}})
    if len(techniques) > 1:
        for name in techniques:
            yield case.but(techniques={other: given for other, given in techniques.items() if other != name})
    if len(case.options) > 2:
        names = list(case.options)
        for part in (names[: len(names) // 2], names[len(names) // 2 :]):
            yield case.but(options={name: value for name, value in case.options.items() if name not in part})
    for name in case.options:
        yield case.but(options={other: value for other, value in case.options.items() if other != name})
    for name, given in techniques.items():
        for argument in given:
            less = {other: value for other, value in given.items() if other != argument}
            yield case.but(techniques={**techniques, name: less})
    plainest = next(iter(SHAPES))
    if case.model != plainest:
        yield case.but(model=plainest)
    plain: dict[str, Any] = {"way": "hand", "hook": "on_train_batch_end", "at": 3}
    if case.save["way"] != "hand":
        yield case.but(save=plain)
    elif case.save != plain and case.save["hook"] != plain["hook"]:
        yield case.but(save={**plain, "at": case.save["at"]})
