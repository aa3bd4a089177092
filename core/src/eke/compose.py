"""Order and conflicts of techniques, from what their records declare. Imports neither torch nor lightning."""

from __future__ import annotations

from collections.abc import Iterable

from eke.spec import RESOURCES, VERBS, ConflictError, Technique


def conflicts(techniques: Iterable[Technique]) -> list[str]:
    """Name every pair that cannot be in one run, a sentence each; empty where all can."""
    chosen = sorted(techniques, key=lambda technique: technique.name)
    return [reason for i, first in enumerate(chosen) for second in chosen[i + 1 :] for reason in _pair(first, second)]


def order(techniques: Iterable[Technique]) -> list[Technique]:
    """Sort techniques into the order in which each seam runs them.

    For each resource: who replaces it comes before who changes it, and who changes it before who reads it.
    ``after`` adds what effects cannot say. What is still open is decided by the first resource a technique
    writes, then by name. The order of ``techniques`` itself never matters.

    Raises:
        ConflictError: two that exclude each other, the same technique twice, or orders that form a circle.
    """
    waiting = sorted(techniques, key=_rank)
    if found := conflicts(waiting):
        raise ConflictError(" ".join(found))
    before = {
        technique.name: {other.name for other in waiting if other is not technique and _precedes(other, technique)}
        for technique in waiting
    }
    done: list[Technique] = []
    while waiting:
        ready = [technique for technique in waiting if before[technique.name] <= {one.name for one in done}]
        if not ready:
            circle = ", ".join(technique.name for technique in waiting)
            raise ConflictError(
                f"{circle} each have to act before another one of them. Leave one out, or declare after= in a record."
            )
        done.append(ready[0])
        waiting.remove(ready[0])
    return done


def _pair(first: Technique, second: Technique) -> list[str]:
    if first.name == second.name:
        return [f"{first.name!r} is given twice. Give it once."]
    found = [
        f"{first.name!r} and {second.name!r} both replace the {resource}. Leave one of them out."
        for resource in sorted(first.touches("replaces") & second.touches("replaces"))
    ]
    if first.kind == second.kind == "strategy":
        found.append(
            f"{first.name!r} and {second.name!r} both give a strategy, and a Trainer takes one. Leave one out."
        )
    for one, other in ((first, second), (second, first)):
        if reason := one.conflicts.get(other.name):
            found.append(f"{one.name!r} cannot run together with {other.name!r}: {reason}")
    return found


def _precedes(first: Technique, second: Technique) -> bool:
    """Whether ``first`` has to act earlier than ``second``. An explicit ``after`` outweighs what effects imply."""
    if first.name in second.after:
        return True
    if second.name in first.after:
        return False
    return any(
        first.touches(earlier) & second.touches(later) for i, earlier in enumerate(VERBS) for later in VERBS[i + 1 :]
    )


def _rank(technique: Technique) -> tuple[int, str]:
    written = technique.touches("replaces") | technique.touches("changes")
    return min((RESOURCES.index(resource) for resource in written), default=len(RESOURCES)), technique.name
