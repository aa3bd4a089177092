"""What layer dropping promises: the papers' probabilities, the expected output, blocks that really do not run."""

from itertools import product

import eke
import pytest
import torch
from eke import strategies
from eke.seams import interceptor
from eke.strategies import StrategyError
from eke.testing import LAYERS, TinyBlocks, fit
from eke_layer_drop import LayerDrop, keep_probabilities, theta
from eke_layer_drop.callback import Rescale, SkipFirst
from lightning.pytorch import Callback
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@pytest.mark.parametrize(
    ("share", "value"), [(0, 1.0), (0.005, 0.803265), (0.01, 0.683940), (0.02, 0.567668), (0.05, 0.503369)]
)
def test_theta_falls_as_in_the_paper(share, value):
    steps = 10_000
    assert theta(share * steps, keep=0.5, gamma=100 / steps) == pytest.approx(value, abs=1e-6)


def test_deeper_blocks_run_less_often():
    assert keep_probabilities(4, 0.5).tolist() == [0.875, 0.75, 0.625, 0.5]
    assert keep_probabilities(12, 0.5).sum() == pytest.approx((3 * 12 - 1) / 4)
    assert keep_probabilities(3, 1.0).tolist() == [1.0, 1.0, 1.0]


class Halves(nn.Module):
    """Adds something of its own to its input."""

    def __init__(self, add):
        super().__init__()
        self.add = add

    def forward(self, x):
        return x + self.add * torch.sin(x)


def test_the_expected_output_is_that_of_the_block_by_enumeration():
    """Over both outcomes of every block, weighted by how likely they are, for one block of each chance."""
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(1, 3, 4)
    for chance in (0.25, 0.5, 0.9):
        block = Halves(0.7)
        interceptor.attach([block], "test")
        whole = block(x)
        expected = torch.zeros_like(x)
        for run in (True, False):
            interceptor.put(block, "test", Rescale(chance) if run else interceptor.Skip())
            expected += (chance if run else 1 - chance) * block(x)
        torch.testing.assert_close(expected, whole, rtol=0, atol=1e-6)  # the difference is taken in float32


def test_linear_blocks_have_the_expected_output_of_the_whole_stack():
    class Linear(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, x):
            return x + self.factor * x

    x = torch.ones(1, 2, 3)
    blocks = nn.Sequential(Linear(0.5), Linear(-0.25), Linear(2.0))
    chances = keep_probabilities(3, 0.4).tolist()
    whole = blocks(x)
    interceptor.attach(blocks, "test")
    expected = torch.zeros_like(x)
    for runs in product((True, False), repeat=3):
        weight = 1.0
        for block, run, chance in zip(blocks, runs, chances, strict=True):
            interceptor.put(block, "test", Rescale(chance) if run else interceptor.Skip())
            weight *= chance if run else 1 - chance
        expected += weight * blocks(x)
    torch.testing.assert_close(expected, whole)


class Seen(Callback):
    """How many blocks ran in each batch, and what the technique says of it."""

    def __init__(self):
        self.ran, self.kinds, self.validated, self.unused = [], [], [], []

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        pass

    def on_before_optimizer_step(self, trainer, model, optimizer):
        self.ran.append([block_ran(block) for block in model.blocks])
        self.kinds.append(next(t for t in eke.techniques(trainer) if isinstance(t, LayerDrop)).step_kind())

    def on_validation_batch_start(self, trainer, model, *_):
        self.validated.append([len(interceptor.actions(block)) for block in model.blocks])


def block_ran(block):
    return any(parameter.grad is not None for parameter in block.parameters())


def test_a_skipped_block_gets_no_gradient_and_step_kind_counts_those_that_ran():
    seen = Seen()
    fit(TinyBlocks(), LayerDrop(0.3, schedule="constant"), epochs=8, callbacks=[seen])
    assert seen.kinds == [f"{sum(ran)} of {LAYERS} blocks" for ran in seen.ran]
    assert len({sum(ran) for ran in seen.ran}) > 1


def test_blocks_run_as_often_as_their_probability_says():
    """Within four standard errors over 4,000 draws of the technique's own numbers."""
    drop = LayerDrop(0.5, schedule="constant")
    chances = keep_probabilities(LAYERS, 0.5)
    draws = torch.rand(4000, LAYERS, dtype=torch.float64, generator=drop.generator) < chances
    error = 4 * (chances * (1 - chances) / 4000).sqrt()
    assert ((draws.double().mean(0) - chances).abs() <= error).all()


def test_validation_runs_every_block_unscaled():
    seen = Seen()
    fit(TinyBlocks(), LayerDrop(0.3, schedule="constant"), validate=True, callbacks=[seen])
    assert seen.validated
    assert all(counts == [0] * LAYERS for counts in seen.validated)


def test_a_keep_of_one_changes_no_bit():
    plain = fit(TinyBlocks()).state["weights"]
    kept = fit(TinyBlocks(), LayerDrop(1.0)).state["weights"]
    assert all(torch.equal(plain[name], kept[name]) for name in plain)


def test_a_step_costs_the_flops_of_the_blocks_that_run():
    model, batch = TinyBlocks(), next(iter(TinyBlocks().train_dataloader()))

    def flops(skipped):
        interceptor.attach(model.blocks, "test")
        for number, block in enumerate(model.blocks):
            interceptor.put(block, "test", *([interceptor.Skip()] if number in skipped else []))
        with FlopCounterMode(display=False) as counter:
            model.loss(batch).backward()
        return counter.get_total_flops()

    flops(())  # the form of the blocks' output is learnt
    whole, half, none = (flops(set(range(number))) for number in (0, LAYERS // 2, LAYERS))
    assert (whole - half) * LAYERS == (whole - none) * (LAYERS // 2)


def test_the_first_block_of_a_run_may_be_skipped_without_a_draw_of_the_global_numbers():
    model = TinyBlocks(dropout=0.5)
    interceptor.attach(model.blocks, "test")
    interceptor.put(model.blocks[0], "test", SkipFirst())
    batch = next(iter(model.train_dataloader()))
    torch.manual_seed(0)
    first = model.loss(batch)
    torch.manual_seed(0)
    assert torch.equal(model.loss(batch), first)  # the second time, the form was known


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"keep": 0.0}, "keep=0.0 is no probability above 0"),
        ({"keep": 1.5}, "keep=1.5 is no probability above 0"),
        ({"schedule": "linear"}, "schedule='linear' is none of: progressive, constant"),
        ({"gamma": -1.0}, "gamma=-1.0 with schedule='progressive': give 0 or more"),
        ({"gamma": 0.1, "schedule": "constant"}, "gamma=0.1 with schedule='constant'"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments, said):
    with pytest.raises(ValueError, match=said):
        LayerDrop(**arguments)


def test_a_strategy_that_shards_is_refused_before_the_first_step():
    class Sharding(FSDPStrategy):
        def __init__(self):
            pass

    with pytest.raises(
        StrategyError, match="'layer_drop' changes hidden states, and Sharding imposes 'awaited blocks'"
    ):
        strategies.check([LayerDrop()], Sharding())
