"""Every pair of techniques: those that share something one by one, the others in runs of up to six at once.

Which run covers which pair changes with the date, and with the variable EKE_COVERING; `make test-slow` takes each pair
by itself.
"""

import os
import zlib
from itertools import combinations

import eke
import pytest
from eke import compose
from eke.testing import build_example, check_pair, check_together, example_model
from eke.testing.covering import groups, seams, share

NAMES = list(eke.available())
RECORDS = {name: eke.get(name) for name in NAMES}
# Of images and of texts, where two meet at all.
PAIRS = [pair for pair in combinations(NAMES, 2) if example_model(*pair)]
SEAMS = {name: seams(build_example(name)) for name in NAMES}
CLOSE = [(a, b) for a, b in PAIRS if share(RECORDS[a], RECORDS[b]) or SEAMS[a] & SEAMS[b]]
APART = [pair for pair in PAIRS if pair not in CLOSE]


def together(names):
    return bool(example_model(*names)) and not compose.conflicts([RECORDS[name] for name in names])


DAY = os.environ.get("EKE_COVERING", "")
GROUPS = groups(APART, together, zlib.crc32(DAY.encode()))


def names_one(refusal, pair):
    return any(name.replace("_", "") in refusal.lower().replace("_", "") for name in pair)


def alone(pairs):
    return [pytest.param(first, second, id=f"{first}+{second}") for first, second in pairs]


def two_give_one_result(first, second):
    refusal = check_pair(lambda: build_example(first), lambda: build_example(second), example_model(first, second))
    assert refusal is None or names_one(refusal, (first, second))


@pytest.mark.parametrize(("first", "second"), alone(CLOSE))
def test_two_techniques_that_share_something_give_one_result_in_both_orders_or_say_why_not(first, second):
    two_give_one_result(first, second)


@pytest.mark.parametrize("names", [pytest.param(names, id="+".join(names)) for names in GROUPS])
def test_several_techniques_give_one_result_in_both_orders_or_say_why_not(names):
    builds = {name: lambda name=name: build_example(name) for name in names}
    for pair, refusal in check_together(builds, example_model(*names)).items():
        assert names_one(refusal, pair), (pair, refusal)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), alone(APART))
def test_two_techniques_that_share_nothing_do_so_by_themselves(first, second):
    two_give_one_result(first, second)


def test_every_pair_is_covered():
    covered = {frozenset(pair) for names in GROUPS for pair in combinations(names, 2)}
    assert {frozenset(pair) for pair in PAIRS} <= covered | {frozenset(pair) for pair in CLOSE}


@pytest.mark.parametrize("name", NAMES)
def test_every_technique_can_be_built_from_its_example(name):
    assert type(build_example(name)).technique == eke.get(name)
