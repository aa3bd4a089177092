"""Optimizers around optimizers: the chain is known, whoever made it."""

import pytest
import torch
from eke.seams.growth import _pairs
from eke.seams.optimizer import transplant
from eke.seams.wrapped import OptimizerWrapper, forget_state, inner_of, walk
from eke.testing import run_ranks
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import SGD, AdamW, Optimizer


class Around(OptimizerWrapper, Optimizer):
    """Under a name of its own: nobody has to guess it."""

    def __init__(self, wrapped):
        super().__init__(wrapped.param_groups, wrapped.defaults)
        self.mine = wrapped

    @property
    def inner(self):
        return self.mine

    def step(self, closure=None):
        self.mine.step(closure)


def weight():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.full((3,), 2.0)
    return p


def test_the_chain_is_walked_from_the_outside_and_lightnings_own_wrapper_left_out():
    base = AdamW([weight()])
    outer = Around(Around(base))
    assert list(walk(outer)) == [outer, outer.mine, base]
    assert list(walk(LightningOptimizer(outer))) == [outer, outer.mine, base]
    assert list(walk(base)) == [base]
    assert inner_of(base) is None


def test_torchs_sharded_optimizer_is_one_of_them():
    def work(rank):
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
        sharded = ZeroRedundancyOptimizer([weight(), weight()], AdamW, lr=0.1)
        outside, inside = walk(sharded)
        return outside is sharded, type(inside).__name__

    assert run_ranks(work, 2) == [(True, "AdamW")] * 2


def test_an_attribute_of_the_same_name_makes_no_wrapper():
    optimizer = SGD([weight()], lr=0.1)
    optimizer.base = optimizer.optim = optimizer.inner = AdamW([weight()])
    assert list(walk(optimizer)) == [optimizer]


def test_a_wrapper_that_does_not_say_what_it_wraps_is_told_so():
    class Mute(OptimizerWrapper, SGD):
        pass

    with pytest.raises(NotImplementedError, match="Mute wraps an optimizer and does not say which: define inner"):
        list(walk(Mute([weight()], lr=0.1)))


def test_state_is_forgotten_and_carried_over_inside_too():
    p = weight()
    old, new = Around(AdamW([p])), Around(AdamW([p]))
    old.step()
    transplant(old, new, {})
    assert new.mine.state[p] is old.mine.state[p]
    assert _pairs([old], [new]) == {id(old): new, id(old.mine): new.mine}
    forget_state(new)
    assert not new.mine.state
    assert old.mine.state


def test_nothing_is_kept_in_cpu_memory_unless_it_is_said():
    assert list(Around(AdamW([weight()])).host_tensors()) == []
