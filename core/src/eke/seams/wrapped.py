"""Optimizers around optimizers: what each keeps, without knowing whose it is.

The trick it hides: torch's ``Optimizer`` says nothing of an optimizer inside, so state is carried over, cleared or
counted for the outer one and forgotten for the inner one, where the numbers are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer


class OptimizerWrapper:
    """Inherit it before ``Optimizer`` where one optimizer steps another.

    Example::

        class Lookahead(OptimizerWrapper, Optimizer):
            def __init__(self, base):
                super().__init__(base.param_groups, base.defaults)
                self.base = base

            @property
            def inner(self):
                return self.base
    """

    @property
    def inner(self) -> Optimizer:
        """The optimizer that this one steps. Its groups are as many, in the same order."""
        raise NotImplementedError(f"{type(self).__name__} wraps an optimizer and does not say which: define inner.")

    def host_tensors(self) -> Iterable[Tensor]:
        """Tensors beside ``state`` that are kept in CPU memory, such as copies of weights."""
        return ()


def inner_of(optimizer: Any) -> Optimizer | None:
    """The optimizer that this one steps, if it is known to step one."""
    if isinstance(optimizer, OptimizerWrapper):
        return optimizer.inner
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        return optimizer.optim
    return None


def walk(optimizer: Any) -> Iterator[Optimizer]:
    """An optimizer, the one inside it, and so on. Lightning's wrapper is not one of them."""
    if isinstance(optimizer, LightningOptimizer):
        optimizer = optimizer.optimizer
    while optimizer is not None:
        yield optimizer
        optimizer = inner_of(optimizer)


def forget_state(optimizer: Any) -> None:
    """Drop the states of all parameters, in what is wrapped as well."""
    for one in walk(optimizer):
        one.state.clear()
