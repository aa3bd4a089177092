"""What a dry run pretends: processes that do not exist, and modules of fake tensors that can be moved and copied."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from eke import compat
from eke.forecast.errors import ForecastError
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


def really(function: Callable[[], Any]) -> Callable[[], Any]:
    """Call something with real tensors: who is who among the processes is a tensor, and has to be read."""

    def call() -> Any:
        with compat.unset_fake_temporarily():
            return function()

    return call


@contextmanager
def processes(ranks: int) -> Iterator[None]:
    """Pretend to be the first of several processes, each of which does what this one does."""
    if torch.distributed.is_initialized():
        raise ForecastError("a process group exists already: forecast before the run, not inside of it.")
    settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0",
                "NODE_RANK": "0", "LOCAL_WORLD_SIZE": str(ranks)}  # fmt: skip
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    compat.start_fake_processes(ranks)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
        compat.forget_processes()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


@contextmanager
def movable() -> Iterator[None]:
    """Let modules be moved, cast and copied, which torch does by exchanges that fake tensors refuse."""
    original = nn.Module._apply

    def apply(module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        made: dict[int, Tensor] = {}

        def converted(tensor: Tensor) -> Tensor:
            if id(tensor) not in made:
                with torch.no_grad():
                    new = convert(tensor)
                same = new is tensor or (new.dtype == tensor.dtype and new.device == tensor.device)
                if not same and isinstance(tensor, nn.Parameter):
                    new = nn.Parameter(new, tensor.requires_grad)
                made[id(tensor)] = tensor if same else new
            return made[id(tensor)]

        for part in module.modules() if recurse else (module,):
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = converted(tensor)
        return module

    def copied(tensor: FakeTensor, memo: dict[int, Any]) -> Tensor:
        if id(tensor) not in memo:
            with torch.no_grad():
                new = tensor.detach().clone()
            memo[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
        return memo[id(tensor)]

    nn.Module._apply = apply
    FakeTensor.__deepcopy__ = copied
    try:
        yield
    finally:
        nn.Module._apply = original
        del FakeTensor.__deepcopy__


@contextmanager
def collecting_nothing() -> Iterator[None]:
    """Keep Python's collector off: what waits for it may wait for the whole step, and it comes when it likes."""
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
