"""Order and conflicts of techniques, from what their records declare. Imports neither torch nor lightning."""

from __future__ import annotations

from collections.abc import Iterable

from eke.spec import ORDERED, RESOURCES, SEAMS, ConflictError, Technique

_PLACE = {resource: place for place, resource in enumerate(RESOURCES)}


def conflicts(techniques: Iterable[Technique]) -> list[str]:
    """Name every pair that cannot be in one run, a sentence each; empty where all can."""
    chosen = sorted(techniques, key=lambda technique: technique.name)
    return [reason for i, first in enumerate(chosen) for second in chosen[i + 1 :] for reason in _pair(first, second)]


def refusals(built: Iterable[object]) -> list[str]:
    """What techniques that are built refuse of each other by their arguments, a sentence each; empty where they go
    together."""
    records = {id(one): getattr(type(one), "technique", None) for one in built}
    objects = [one for one in built if isinstance(records[id(one)], Technique)]
    found = []
    for one in objects:
        others = [records[id(other)] for other in objects if other is not one]
        words = one.refuses(others) if hasattr(one, "refuses") else ""
        found += [f"{records[id(one)].name!r}: {words}"] if words else []
    return found


def order(techniques: Iterable[Technique], at: str | None = None) -> list[Technique]:
    """Sort techniques into the order in which they act.

    At a seam, which is a method of :data:`eke.spec.SEAMS`, only the resources count that are settled there: who
    replaces one comes before who changes it, and who changes it before who reads it. ``after`` adds what effects
    cannot say, at every seam. So a technique may come first at one seam and last at another: one that sets fresh
    weights before another one copies them grows after that one where the module tree is concerned.

    Lightning's hooks (``on_train_batch_start`` and so on) belong to no seam and have one order for all of them: the
    resources are gone through as a run meets them, samples first, and what an earlier one has settled a later one
    does not undo. The same order decides what the resources of a seam leave open, so that seams agree where nothing
    speaks against it. What is still open is decided by the first resource a technique writes, then by name. The order
    of ``techniques`` itself never matters.

    Args:
        techniques: Records of one run.
        at: Name of a method. One that is no seam, and None, give the order at hooks.

    Raises:
        ConflictError: two that exclude each other, the same technique twice, or orders that form a circle at a seam.
    """
    chosen = sorted(techniques, key=_priority)
    if found := conflicts(chosen):
        raise ConflictError(" ".join(found))
    hooks = _order_at_hooks(chosen)
    sorted_at = {seam: _order_at(seam, hooks) for seam in SEAMS}  # all of them: a circle anywhere is refused
    return sorted_at.get(at, hooks)


def _order_at(seam: str, chosen: list[Technique]) -> list[Technique]:
    """Sort for one seam; what its resources leave open stays as in ``chosen``."""
    earlier = {
        one.name: {other.name for other in chosen if other is not one and _precedes(other, one, SEAMS[seam])}
        for one in chosen
    }
    waiting, done = list(chosen), []
    while waiting:
        ready = next((one for one in waiting if earlier[one.name] <= {other.name for other in done}), None)
        if ready is None:
            circle = ", ".join(one.name for one in waiting)
            raise ConflictError(
                f"{circle} each have to act before another one of them in {seam}. Leave one out, or declare after= in "
                "a record."
            )
        done.append(ready)
        waiting.remove(ready)
    return done


def _order_at_hooks(chosen: list[Technique]) -> list[Technique]:
    earlier: dict[str, set[str]] = {one.name: set() for one in chosen}  # all that come before, however indirectly

    def settle(first: Technique, second: Technique) -> None:
        if second.name in earlier[first.name]:
            return  # settled the other way round
        for name in [name for name in earlier if name == second.name or second.name in earlier[name]]:
            earlier[name] |= {first.name} | earlier[first.name]

    pairs = [(first, second) for first in chosen for second in chosen if first is not second]
    for first, second in pairs:
        if first.name in second.after:
            settle(first, second)
    for resource in RESOURCES:
        for first, second in pairs:
            if _precedes(first, second, (resource,)):
                settle(first, second)
    done: list[Technique] = []
    while len(done) < len(chosen):
        names = {one.name for one in done}
        done.append(next(one for one in chosen if one.name not in names and earlier[one.name] <= names))
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
        for verb in ("replaces", "changes"):
            found += [
                f"{one.name!r} relies on the {resource} as it is ({RESOURCES[resource]}), and {other.name!r} {verb} "
                "it. Leave one of them out."
                for resource in sorted(one.touches("keeps") & other.touches(verb))
            ]
        if reason := one.conflicts.get(other.name):
            found.append(f"{one.name!r} cannot run together with {other.name!r}: {reason}")
    return found


def _precedes(first: Technique, second: Technique, resources: tuple[str, ...]) -> bool:
    """Whether ``first`` has to act earlier than ``second`` on one of these. ``after`` outweighs what effects imply."""
    if first.name in second.after:
        return True
    if second.name in first.after:
        return False
    return any(
        first.touches(earlier) & second.touches(later) & set(resources)
        for i, earlier in enumerate(ORDERED)
        for later in ORDERED[i + 1 :]
    )


def _priority(technique: Technique) -> tuple[int, str]:
    written = technique.touches("replaces") | technique.touches("changes")
    return min((_PLACE[resource] for resource in written), default=len(RESOURCES)), technique.name
