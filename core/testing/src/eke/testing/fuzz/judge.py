"""What has to be equal between a run that was never broken and the rest of one that was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eke.testing.compare import differences

# In the order in which a fault shows: the first that differs names the kind of the failure.
PARTS = ("batches", "validations", "weights", "optimizers", "schedules", "progress", "random state", "metrics",
         "techniques", "saved")  # fmt: skip

LONGEST = 300  # letters of a line: a state that is missing is printed whole elsewhere


def judge(whole: Sequence[Mapping[str, Any]], rest: Sequence[Mapping[str, Any]], at: Mapping[str, int]) -> list[str]:
    """Name the places that differ, a line each, each begun with its part; empty where the runs are one.

    Args:
        whole: Of each process, the state of the run that was never broken.
        rest: Of each process, that of the resumed run.
        at: How many batches and validations lie before the checkpoint.
    """
    lines: list[tuple[int, str]] = []
    for rank, (one, other) in enumerate(zip(whole, rest, strict=True)):
        left = {
            **one,
            "batches": one["batches"][at["trained"] :],
            "validations": one["validations"][at["validated"] :],
        }
        process = f"process {rank}: " if len(whole) > 1 else ""
        # A resumed run that has nothing left to do does not end training, where the rest would be taken down.
        parts = PARTS if other["batches"] or left["batches"] else ("validations", "weights")
        for number, part in enumerate(parts):
            if part in ("batches", "validations"):
                found = _events(left[part], other[part])
            else:
                found = differences(left.get(part), other.get(part))
            lines += [(number, f"{part}: {process}{line}"[:LONGEST]) for line in found]
    return [line for _, line in sorted(lines, key=lambda pair: pair[0])]


def _events(whole: list[dict[str, Any]], rest: list[dict[str, Any]]) -> list[str]:
    """The first event that differs: what follows differs with it."""
    for one, other in zip(whole, rest, strict=False):
        if found := differences(one, other):
            return [f"{one['where']}: {line}" for line in found]
    if len(whole) > len(rest):
        return [f"{whole[len(rest)]['where']} and {len(whole) - len(rest) - 1} more are missing in the resumed run"]
    if len(rest) > len(whole):
        return [f"{rest[len(whole)]['where']} and {len(rest) - len(whole) - 1} more are in the resumed run alone"]
    return []


def ranks_apart(states: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where two processes hold other weights, though each should hold all of them."""
    return [f"weights of two processes: {line}" for line in differences(states[0]["weights"], states[1]["weights"])]
