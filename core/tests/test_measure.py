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


class Attends(nn.Module):
    """One block, (batch, length, width), and a head of 256."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.head = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.Linear(width, 256)

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.proj(self.attend(q, k, v).transpose(1, 2).reshape(batch, length, width))
        return self.head(x + self.down(self.up(x)))

    def attend(self, q, k, v):
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


class AttendsByHand(Attends):
    def attend(self, q, k, v):
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v


@pytest.mark.parametrize("kind", [Attends, AttendsByHand])
def test_flops_of_a_step_are_six_a_weight_and_twelve_a_width_and_length(kind):
    batch, length, width = 2, 32, 64
    model = kind(width, heads=4)
    x = torch.randn(batch, length, width, requires_grad=True)  # so that backward reaches the first layer's input too
    with measure.count_flops() as counted:
        model(x).sum().backward()
    weights = sum(weight.numel() for weight in model.parameters() if weight.ndim == 2)
    assert counted["flops"] == batch * length * (6 * weights + 12 * width * length)


def test_flops_under_a_mask_or_without_gradients_are_those_of_all_pairs():
    q, k, v = torch.randn(3, 2, 4, 32, 16)
    mask = torch.ones(32, 32, dtype=torch.bool).tril()
    with measure.count_flops() as counted, torch.no_grad():
        nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert counted["flops"] == 4 * 2 * 4 * 32 * 32 * 16


def test_a_model_with_frozen_weights_is_measured(model):
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model[2].parameters(), foreach=False)

    def step():
        model(torch.randn(8, 64)).sum().backward()
        optimizer.step()

    step()
    peak = measure.memory_peak(step, model, optimizer)
    assert peak["parameters"] == sum(p.nbytes for p in model.parameters())
    assert peak["gradients"] == sum(p.nbytes for p in model[2].parameters())


def test_a_look_before_the_step_changes_nothing(model):
    def peak(looks):
        def step():
            batch = torch.randn(8, 64)
            if looks:
                with torch.no_grad():
                    model(batch)
            model(batch).sum().backward()

        step()
        return measure.memory_peak(step, model)

    assert peak(looks=True) == peak(looks=False)


def test_a_step_by_closure_has_the_causes_of_one_by_hand():
    def peak(by_closure):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        x = torch.randn(4096, 64)  # activations are most of it

        def closure():
            model(x).square().mean().backward()

        def step():
            if by_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
            optimizer.zero_grad()

        step()
        return measure.memory_peak(step, model, optimizer)

    by_hand = peak(by_closure=False)
    assert by_hand["activations"] > 4096 * 256 * 4
    assert by_hand["optimizer"] < 300_000
    assert peak(by_closure=True) == by_hand


def test_ceilings_are_rates_and_the_best_is_no_less_than_the_median():
    found = measure.ceilings(seconds=0.05)
    assert set(found) == {"float32", "bfloat16", "copy"}
    for rate in found.values():
        assert rate["best"] >= rate["median"] > 0


def test_a_rate_is_the_amount_over_the_time_of_a_repetition(monkeypatch):
    times = iter([0.0, 0.0, 2.0, 2.0, 6.0, 6.0, 7.0, 99.0])  # three repetitions: of 2, 4 and 1 second
    monkeypatch.setattr(measure, "perf_counter", lambda: next(times))
    rate = measure._rate(lambda: None, 12.0, torch.device("cpu"), seconds=1.0)
    assert rate == {"best": 12.0, "median": 6.0}
