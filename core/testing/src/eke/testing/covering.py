"""All pairs of many techniques in few runs: those that share something by themselves, the others several at a time.

The number of pairs grows with the square of the techniques. Most have nothing to do with each other, and a run of six
techniques tries fifteen such pairs at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import combinations
from random import Random

from eke import compose
from eke.spec import Technique

# Methods through which one thing goes from technique to technique. Not alter_model, which most have, each for other
# parts of the model: records say which.
SEAMS = (
    "alter_optimizer", "alter_schedulers", "alter_loader", "begin_samples", "alter_batch", "around_step",
    "before_optimizer_step", "after_optimizer_step", "alter_eval_batch", "eval_weights", "alter_checkpoint",
)  # fmt: skip


def share(first: Technique, second: Technique) -> bool:
    """Whether two records name one resource that one of them writes, or exclude each other."""
    one, other = ((_written(record), _written(record) | record.touches("reads")) for record in (first, second))
    return bool(one[0] & other[1] or other[0] & one[1] or compose.conflicts([first, second]))


def seams(built: object) -> frozenset[str]:
    """Those of :data:`SEAMS` that a technique overrides."""
    from eke.technique import TechniqueCallback

    if not isinstance(built, TechniqueCallback):
        return frozenset()
    return frozenset(name for name in SEAMS if getattr(type(built), name) is not getattr(TechniqueCallback, name))


def groups(
    pairs: Iterable[tuple[str, str]],
    fits: Callable[[tuple[str, ...]], bool],
    seed: int,
    largest: int = 6,
) -> list[tuple[str, ...]]:
    """Groups of names that together hold every pair.

    Args:
        pairs: What has to be covered.
        fits: Whether these names can be in one run.
        seed: Another one gives other groups, and another order in each.
        largest: Names in a group. Fewer where no more fit.
    """
    random = Random(seed)
    left = {frozenset(pair) for pair in pairs}
    names = sorted(set().union(*left))
    found: list[tuple[str, ...]] = []
    while left:
        open_pairs = sorted(tuple(sorted(pair)) for pair in left)
        group = list(random.choice(open_pairs))
        while len(group) < largest:
            gain = {
                name: sum(frozenset((name, member)) in left for member in group)
                for name in names
                if name not in group and fits((*group, name))
            }
            most = max(gain.values(), default=0)
            if not most:
                break
            group.append(random.choice([name for name, count in gain.items() if count == most]))
        random.shuffle(group)
        left -= {frozenset(pair) for pair in combinations(group, 2)}
        found.append(tuple(group))
    return found


def _written(record: Technique) -> frozenset[str]:
    return record.touches("replaces") | record.touches("changes")
