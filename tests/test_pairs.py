from itertools import combinations

import eke
import pytest
from eke.testing import build_example, check_pair, example_model

# Of images and of texts, where two meet at all.
PAIRS = [pair for pair in combinations(eke.available(), 2) if example_model(*pair)]


def subjects(name):
    """What a technique reads, changes or replaces: ``{"loss", "batch"}``."""
    return {effect.partition(" ")[2] for effect in eke.get(name).effects}


def cases():
    """Every pair; of those that have nothing to do with each other, three of four are left to ``make test-slow``."""
    apart = 0
    for first, second in PAIRS:
        apart += not subjects(first) & subjects(second)
        slow = apart % 4 and not subjects(first) & subjects(second)
        yield pytest.param(first, second, id=f"{first}+{second}", marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("first", "second"), cases())
def test_two_techniques_give_one_result_in_both_orders_or_say_why_not(first, second):
    refusal = check_pair(lambda: build_example(first), lambda: build_example(second), example_model(first, second))
    assert refusal is None or any(name.replace("_", "") in refusal.lower().replace("_", "") for name in (first, second))


@pytest.mark.parametrize("name", eke.available())
def test_every_technique_can_be_built_from_its_example(name):
    assert type(build_example(name)).technique == eke.get(name)
