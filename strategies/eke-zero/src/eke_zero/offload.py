"""An optimizer whose copy of the weights, states and arithmetic stay in CPU memory.

Source: Ren, Rajbhandari, Aminabadi, Ruwase, Yang, Zhang, Li, He, "ZeRO-Offload: Democratizing Billion-Scale Model
Training", 2021, https://arxiv.org/abs/2101.06840, section 4. Departure: one stream, so that copies and arithmetic do
not overlap, and no delayed update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from eke.seams.wrapped import OptimizerWrapper
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


class Offloaded(OptimizerWrapper, Optimizer):
    """Steps another optimizer on copies of its weights in CPU memory, and copies the result back.

    Args:
        base: The optimizer, which is rebuilt around the copies. What it keeps for each weight is kept on the CPU.
    """

    def __init__(self, base: Optimizer) -> None:
        groups = [{**group, "params": list(group["params"])} for group in base.param_groups]
        super().__init__(groups, dict(base.defaults))
        self._base = base
        self._copies: dict[Tensor, Tensor] = {}
        self._seen: dict[Tensor, int] = {}  # version of each weight when its copy was last equal to it
        for group in base.param_groups:
            group["params"] = [self._copy_of(parameter) for parameter in group["params"]]
        base.state.clear()

    @property
    def inner(self) -> Optimizer:
        return self._base

    def host_tensors(self) -> Iterable[Tensor]:
        return self._copies.values()

    def _copy_of(self, parameter: Tensor) -> Tensor:
        copy = on_cpu(parameter.detach())
        self._copies[parameter] = copy
        self._seen[parameter] = _local(parameter)._version
        return copy

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for ours, theirs in zip(self.param_groups, self._base.param_groups, strict=True):
            theirs.update({key: value for key, value in ours.items() if key != "params"})
        for parameter, copy in self._copies.items():
            if _local(parameter)._version != self._seen[parameter]:  # somebody else has set the weight
                _local(copy).copy_(_local(parameter))
            copy.grad = None if parameter.grad is None else on_cpu(parameter.grad)
        self._base.step()
        for parameter, copy in self._copies.items():
            if copy.grad is not None:
                _local(parameter).copy_(_local(copy), non_blocking=True)
                copy.grad = None
            self._seen[parameter] = _local(parameter)._version
            if copy in self._base.state:
                self.state[parameter] = self._base.state[copy]
        return loss

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # which has moved what it read to the weights' device
        for parameter, copy in self._copies.items():
            _local(copy).copy_(_local(parameter))
            self._seen[parameter] = _local(parameter)._version
            if parameter in self.state:
                state = {
                    key: on_cpu(value) if isinstance(value, Tensor) else value
                    for key, value in self.state[parameter].items()
                }
                self._base.state[copy] = self.state[parameter] = state


def on_cpu(tensor: Tensor) -> Tensor:
    """A copy in CPU memory; of a sharded tensor, of this process's part."""
    if isinstance(tensor, DTensor):
        return DTensor(tensor.to_local().to("cpu", copy=True), tensor._spec, requires_grad=False)
    return tensor.to("cpu", copy=True)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
