import gc

import pytest
import torch
from eke import measure
from torch import nn


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))


def test_saved_bytes_are_those_of_the_formula(model):
    x = torch.randn(128, 64)
    with measure.saved_bytes(model) as saved:
        model(x).sum()
    # each Linear keeps its input, GELU keeps its own: the first input, and the hidden layer before and after GELU
    assert saved["bytes"] == 4 * (128 * 64 + 2 * 128 * 256)


def test_a_storage_with_several_views_counts_once():
    x = torch.randn(8, 3, 4, requires_grad=True)
    doubled = x * 1  # a storage of its own
    with measure.saved_bytes(nn.Identity()) as saved:
        (doubled[:, 0].square() + doubled[:, 1].square() + doubled[:, 2].square()).sum()
    assert saved["bytes"] == doubled.nbytes


def test_the_peak_is_split_by_cause_and_sums_up(model):
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    x = torch.randn(128, 64)

    def step():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    step()  # the first step makes the optimizer states
    peak = measure.memory_peak(step, model, optimizer)
    parameters = sum(weight.nbytes for weight in model.parameters())
    assert peak["parameters"] == parameters
    assert peak["optimizer"] == 2 * parameters + 4 * len(list(model.parameters()))  # two moments, a step count each
    assert peak["total"] == sum(peak[cause] for cause in measure.CAUSES)
    assert peak == measure.memory_peak(step, model, optimizer)


def test_a_call_counts_as_one():
    def nothing():
        pass

    with measure.python_calls() as counted:
        pass
    assert counted["calls"] == 0
    with measure.python_calls() as counted:
        nothing()
        len("")
    assert counted["calls"] == 2


def test_finalizers_of_earlier_objects_are_not_counted():
    class Circle:
        def __init__(self):
            self.itself = self

        def __del__(self):
            pass

    gc.collect()
    for _ in range(100):
        Circle()
    with measure.python_calls() as counted:
        held = [[] for _ in range(20_000)]  # as many containers as make the collector come by
    assert counted["calls"] in (0, 1)  # from Python 3.12 a comprehension is no call
    assert len(held) == 20_000
    assert gc.isenabled()


def test_operators_of_backward_count_too():
    weight, x = torch.ones(2, 2, requires_grad=True), torch.ones(2, 2)
    with measure.OperatorCounter() as forward:
        loss = (weight * x).sum()
    with measure.OperatorCounter() as backward:
        loss.backward()
    assert forward.counts["aten.mul.Tensor"] == 1
    assert backward.counts["aten.mul.Tensor"] == 1  # the gradient of a product
