"""What a noisy machine allows to be said, against values worked out by hand."""

import math
import statistics

import pytest
from eke_bench import stats
from eke_bench.stats import Interval


def test_a_bootstrap_is_the_median_with_an_interval_of_values_that_occurred():
    values = [1.0, 2.0, 3.0, 4.0, 100.0]
    found = stats.bootstrap(values)
    assert found.value == 3.0
    assert found.low in values
    assert found.high in values
    assert found.low < found.value < found.high


def test_the_same_values_give_the_same_interval():
    assert stats.bootstrap([3.0, 1.0, 2.0]) == stats.bootstrap([3.0, 1.0, 2.0])


def test_a_bootstrap_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no values to take a median of"):
        stats.bootstrap([])


def test_a_paired_mean_has_students_interval():
    found = stats.paired_mean([0.1, 0.2, 0.3])
    reach = 4.303 * statistics.stdev([0.1, 0.2, 0.3]) / math.sqrt(3)
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((0.2 - reach, 0.2 + reach))


def test_one_pair_says_nothing():
    assert stats.paired_mean([5.0]) == Interval(5.0, -math.inf, math.inf)


# Loss 3, 2, 1 for a cost of 10, 100, 1000: a straight line along the logarithm.
CURVE = [(1000.0, 1.0), (10.0, 3.0), (100.0, 2.0)]


@pytest.mark.parametrize(
    ("quality", "cost"), [(3.0, 10.0), (2.5, 10**1.5), (2.0, 100.0), (1.25, 10**2.75), (1.0, 1000.0)]
)
def test_the_cost_of_a_quality_lies_on_the_curve(quality, cost):
    assert stats.cost_of_quality(CURVE, quality) == Interval(*[pytest.approx(cost)] * 3)


def test_beyond_the_curve_there_are_bounds_and_no_extrapolation():
    assert stats.cost_of_quality(CURVE, 0.9) == Interval(1000.0, 1000.0, math.inf)
    assert stats.cost_of_quality(CURVE, 3.1) == Interval(10.0, 0.0, 10.0)


def test_a_dearer_run_that_came_out_worse_does_not_raise_the_price():
    bumpy = [(10.0, 3.0), (100.0, 2.0), (1000.0, 2.5)]
    assert stats.cost_of_quality(bumpy, 2.25).value == pytest.approx(10**1.75)
    assert stats.cost_of_quality(bumpy, 2.0).value == pytest.approx(100.0)


@pytest.mark.parametrize(("cost", "quality"), [(10.0, 3.0), (10**1.5, 2.5), (1000.0, 1.0), (1040.0, 1.0), (9.6, 3.0)])
def test_the_quality_at_a_cost_lies_on_the_curve(cost, quality):
    assert stats.quality_at_cost(CURVE, cost) == pytest.approx(quality)


@pytest.mark.parametrize("cost", [9.0, 1100.0])
def test_a_cost_beyond_the_budgets_has_no_quality(cost):
    assert stats.quality_at_cost(CURVE, cost) is None


def test_a_profile_counts_workloads_within_a_factor_of_the_best_and_a_miss_is_infinite():
    costs = {"plain": {"a": 1.0, "b": 1.0}, "fast": {"a": 0.5, "b": 2.5}, "half": {"a": 0.5}}
    found = stats.performance_profile(costs, [1.0, 2.0, 3.0])
    assert found == {"plain": [0.5, 1.0, 1.0], "fast": [0.5, 0.5, 1.0], "half": [0.5, 0.5, 0.5]}


class Clock:
    """Time that passes only when a function takes some."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def takes(self, seconds):
        def work():
            self.now += seconds

        return work


def test_interleaving_gives_the_ratio_within_a_round_and_a_control_of_one():
    clock = Clock()
    found = stats.interleaved({"one": clock.takes(2.0), "half": clock.takes(1.0)}, rounds=5, clock=clock)
    assert found["half"]["ratio"] == pytest.approx([0.5, 0.5, 0.5])
    assert found["half"]["significant"]
    assert found["one (again)"]["ratio"] == pytest.approx([1.0, 1.0, 1.0])
    assert found["one"]["seconds"] == pytest.approx(2.0)


def test_a_machine_that_slows_down_does_not_change_a_ratio():
    clock = Clock()
    slow = {"factor": 1.0}

    def takes(seconds):
        def work():
            clock.now += seconds * slow["factor"]

        return work

    def last():
        takes(1.0)()
        slow["factor"] *= 1.0001  # each time it comes by, the machine is slower

    found = stats.interleaved({"one": takes(1.0), "last": last}, rounds=20, clock=clock)
    assert found["last"]["ratio"][0] == pytest.approx(1.0, abs=1e-3)


def test_what_overlaps_the_control_is_no_significant_difference():
    clock = Clock()
    found = stats.interleaved({"one": clock.takes(1.0), "same": clock.takes(1.0)}, rounds=4, clock=clock)
    assert not found["same"]["significant"]
