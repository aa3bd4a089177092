"""What a run costs, on a clock that the test moves by hand."""

import pytest
import torch
from eke_bench import meter as meters
from eke_bench.meter import Meter
from torch import nn


class Machine:
    """A clock and the speed at which work on it goes."""

    def __init__(self):
        self.now, self.slowness = 0.0, 1.0

    def work(self, seconds):
        self.now += seconds * self.slowness


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(meters.time, "perf_counter", lambda: machine.now)
    monkeypatch.setattr(meters.time, "process_time", lambda: machine.now)
    return machine


def meter(machine, probe=2.0, every=4):
    return Meter(lambda: machine.work(probe), every=every, count=False)


def test_wall_and_cpu_hold_every_step_and_neither_probes_nor_pauses(machine):
    one = meter(machine)
    one.start()
    for _ in range(8):
        machine.work(3.0)
        one.step()
        one.pause()
        machine.work(100.0)
        one.resume()
    one.stop()
    costs = one.result()["costs"]
    assert (costs["steps"], costs["wall_s"], costs["cpu_s"]) == (8, pytest.approx(24.0), pytest.approx(24.0))


def test_what_happens_between_steps_is_charged_to_the_next_one(machine):
    one = meter(machine)
    one.start()
    for _ in range(8):
        machine.work(1.0)  # a loader that chooses samples, say
        machine.work(3.0)
        one.step()
    one.stop()
    assert one.result()["costs"]["wall_s"] == pytest.approx(32.0)


def test_the_normalized_cost_is_in_steps_of_the_reference(machine):
    one = meter(machine)
    one.start()
    for _ in range(8):
        machine.work(3.0)
        one.step()
    one.stop()
    assert one.result()["costs"]["normalized_cost"] == pytest.approx(8 * 3 / 2)


def test_a_neighbour_who_slows_the_machine_down_does_not_enter_the_normalized_cost(machine):
    one = meter(machine, every=1)
    one.start()
    for number in range(40):
        machine.slowness = 1.0 + 0.01 * number  # 40 % slower at the end
        machine.work(3.0)
        one.step()
    one.stop()
    costs = one.result()["costs"]
    assert costs["cpu_s"] > 1.15 * 40 * 3
    assert costs["normalized_cost"] == pytest.approx(40 * 3 / 2, rel=0.01)


def test_each_kind_of_step_is_charged_its_own_cost_and_one_slow_window_changes_nothing(machine):
    one = meter(machine, every=5)
    one.start()
    for number in range(40):
        machine.slowness = 10.0 if 15 < number <= 18 else 1.0  # a hiccup of three steps
        short = number % 2
        machine.work(1.0 if short else 4.0)
        one.step("short" if short else "long")
    one.stop()
    result = one.result()
    assert result["kinds"]["short"]["normalized_cost"] == pytest.approx(0.5)
    assert result["kinds"]["long"]["normalized_cost"] == pytest.approx(2.0)
    assert result["costs"]["normalized_cost"] == pytest.approx(20 * 0.5 + 20 * 2.0)


def test_the_first_step_is_reported_apart(machine):
    one = meter(machine)
    one.start()
    machine.work(60.0)  # compiles
    one.step()
    for _ in range(7):
        machine.work(3.0)
        one.step()
    one.stop()
    costs = one.result()["costs"]
    assert costs["first_step_s"] == pytest.approx(60.0)
    assert costs["wall_s"] == pytest.approx(24.0)


def test_the_curve_has_cost_and_quality_at_each_evaluation(machine):
    one = meter(machine)
    one.start()
    for number in range(8):
        machine.work(3.0)
        one.step()
        if number % 4 == 3:
            one.pause()
            one.evaluated(val_loss=8.0 - number)
            one.resume()
    one.stop()
    first, last = one.result()["curve"]
    assert (first["step"], first["val_loss"], first["normalized_cost"]) == (4, 5.0, pytest.approx(6.0))
    assert (last["step"], last["val_loss"], last["normalized_cost"]) == (8, 1.0, pytest.approx(12.0))


def counted_run(kinds):
    """Train a layer, 8 samples of 16 numbers to 4, a step for each kind."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 4, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    one = Meter(lambda: None, every=2)
    one.start()
    for kind in kinds:
        rows = 8 if kind == "full" else 2
        counting = one.counting(layer, optimizer) if one.wants_count() else None
        if counting is not None:
            with counting as tell:
                layer(torch.ones(rows, 16)).sum().backward()
                optimizer.step()
                tell(kind)
        else:
            layer(torch.ones(rows, 16)).sum().backward()
            optimizer.step()
            one.step(kind)
        optimizer.zero_grad()
    one.stop()
    return one.result(), layer


def test_flops_are_counted_once_a_kind_and_charged_for_every_step():
    result, _ = counted_run(["full"] * 3 + ["part"] * 5)
    full, part = 2 * 2 * 8 * 16 * 4, 2 * 2 * 2 * 16 * 4  # forward and the gradient of the weight
    assert result["kinds"]["full"]["flops"] == full
    assert result["kinds"]["part"]["flops"] == part
    assert result["costs"]["flops"] == 3 * full + 5 * part


def test_memory_is_that_of_the_dearest_kind():
    result, layer = counted_run(["full"] * 3 + ["part"] * 5)
    assert result["costs"]["memory"] == result["kinds"]["full"]["memory"]
    assert result["costs"]["memory"]["parameters"] == layer.weight.nbytes


def test_counting_changes_no_weight():
    _, counted = counted_run(["full"] * 6)
    torch.manual_seed(0)
    layer = nn.Linear(16, 4, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(6):
        layer(torch.ones(8, 16)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(counted.weight, layer.weight, rtol=0, atol=0)


def test_a_kind_that_came_once_and_was_not_timed_counts_as_the_mean_of_the_others(machine):
    one = meter(machine, every=2)
    one.start()
    for number in range(9):
        machine.work(3.0)
        one.step("first" if number == 0 else "later")
    one.stop()
    assert one.result()["costs"]["normalized_cost"] == pytest.approx(9 * 3 / 2)


def test_kinds_that_came_often_and_were_not_counted_leave_a_hole():
    assert meters._filled({"known": 7, "unknown": None}, {"known": 10, "unknown": 2})["unknown"] is None
    assert meters._filled({"known": 7, "unknown": None}, {"known": 200, "unknown": 2})["unknown"] == 7


def test_a_kind_that_was_never_counted_leaves_a_hole_and_no_number():
    one = Meter(lambda: None, every=2, count=False)
    one.start()
    one.step("a")
    one.stop()
    assert one.result()["costs"]["flops"] is None
    assert one.result()["costs"]["memory"] is None
