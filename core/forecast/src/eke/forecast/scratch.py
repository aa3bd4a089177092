"""What CPU kernels take for themselves while they run, learned by running them.

Nobody sees it from outside: a product of bfloat16 matrices may pack one of them anew, a sum of two dtypes casts one. So
each operator of a step is run once, for real, on zeros of the same shapes and under torch's memory profiler. What a
run costs is bounded by its work and by how fast this machine is at the dtype, not by bytes: a product of matrices that
fit in 64 MiB takes minutes on a processor without instructions for bfloat16. An operator of more work runs at two
smaller sizes, and a straight line through the two tells what it takes at its own.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from eke import compat, measure
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map

LONGEST = 0.05  # seconds of processor time that one run may take
PATIENCE = 5.0  # seconds of processor time for all runs of a forecast; what is left then counts as taking nothing
READ = 2e8  # elements a second of an operator that only reads and writes them


@dataclass(frozen=True)
class Like:
    """What a tensor was like that an operator got."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return _product(self.shape) * self.dtype.itemsize

    def zeros(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype).zero_()

    def resized(self, shape: tuple[int, ...]) -> Like:
        """Of another shape, dimensions in memory in the same order and expanded ones still expanded."""
        stride, step = [0] * len(shape), 1
        for place in sorted(range(len(shape)), key=lambda i: self.stride[i]):
            if self.stride[place] or self.shape[place] == 1:
                stride[place], step = step, step * shape[place]
        return Like(shape, tuple(stride), self.dtype)


@dataclass(frozen=True)
class Call:
    """An operator and its arguments, tensors as :class:`Like`."""

    func: Any
    args: Any
    kwargs: Any

    @property
    def key(self) -> Any:
        leaves = tree_leaves((self.args, self.kwargs))
        return self.func, *(leaf if isinstance(leaf, Like) else repr(leaf) for leaf in leaves)

    @property
    def tensors(self) -> list[Like]:
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Like)]

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in self.tensors)

    def real(self) -> tuple[Any, Any]:
        """Arguments with zeros for tensors."""
        return tree_map(lambda leaf: leaf.zeros() if isinstance(leaf, Like) else leaf, (self.args, self.kwargs))

    def seconds(self) -> float:
        """About how long it will run, by its floating-point operations, if it has any to count, and its elements."""
        with torch.device("meta"):
            args, kwargs = self.real()
        flops = {"flops": 0}
        with suppress(RuntimeError, NotImplementedError, IndexError), measure.count_flops() as flops:  # noqa: F811
            self.func(*args, **kwargs)
        floating = next((one.dtype for one in self.tensors if one.dtype.is_floating_point), torch.float32)
        elements = sum(_product(one.shape) for one in self.tensors)
        return elements / READ + (flops["flops"] / measure.speed(floating) if flops["flops"] else 0.0)

    def halved(self) -> Call | None:
        """With its largest size halved wherever it occurs, in tensors and numbers alike; None where none is left.

        Equal sizes stay equal, so that what goes together still does.
        """
        largest = max((size for one in self.tensors for size in one.shape), default=1)
        if largest < 4:
            return None

        def halve(leaf: Any) -> Any:
            if isinstance(leaf, Like):
                return leaf.resized(tuple(largest // 2 if size == largest else size for size in leaf.shape))
            return largest // 2 if type(leaf) is int and leaf == largest else leaf

        return Call(self.func, *tree_map(halve, (self.args, self.kwargs)))


class Scratch:
    """Bytes that operators take beside what they are given and give back.

    Attributes:
        ran: Bytes of what was run for real.
    """

    def __init__(self, longest: float = LONGEST, patience: float = PATIENCE) -> None:
        self.longest, self.patience = longest, patience
        self.ran: dict[Any, int] = {}
        self.known: dict[Any, int] = {}
        self.asked: dict[Any, Call] = {}

    def ask(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A key under which :meth:`answer` will know the bytes; None where there is nothing to be known."""
        if func._schema.is_mutable or func.is_view or func.namespace != "aten":
            return None
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(type(leaf) is not FakeTensor for leaf in tensors) or not any(leaf.numel() for leaf in tensors):
            return None

        def like(leaf: Any) -> Any:
            return Like(tuple(leaf.shape), leaf.stride(), leaf.dtype) if isinstance(leaf, Tensor) else leaf

        call = Call(func, *tree_map(like, (args, kwargs)))
        if (key := call.key) not in self.known:
            self.asked[key] = call
        return key

    def answer(self) -> dict[Any, int]:
        """Run what was asked for, or smaller ones of its kind. Returns key to bytes."""
        with compat.unset_fake_temporarily():
            sizes = {key: self._sizes(call) for key, call in self.asked.items()}
            runs = {one.key: one for few in sizes.values() for one in few if one.key not in self.ran}
            self._run(list(runs.values()))
        for key, few in sizes.items():
            points = [(one.nbytes, self.ran[one.key]) for one in few if one.key in self.ran]
            self.known[key] = _extended(points, self.asked[key].nbytes)
        self.asked = {}
        return self.known

    def _sizes(self, call: Call) -> list[Call]:
        """The call itself where it is small enough, else two smaller ones, the larger first."""
        if call.seconds() <= self.longest:
            return [call]
        found: list[Call] = []
        while len(found) < 2 and (call := call.halved()) is not None:
            if call.seconds() <= self.longest:
                found.append(call)
        return found

    def _run(self, calls: list[Call]) -> None:
        kept: dict[Any, int] = {}
        end = time.process_time() + self.patience
        with torch.random.fork_rng(devices=[]), torch.no_grad(), _without_stderr(), compat.memory_profile() as profiled:
            for call in sorted(calls, key=lambda one: one.nbytes):
                if time.process_time() > end:
                    break
                args, kwargs = call.real()
                try:
                    with profiled.part(call.key):
                        result = call.func(*args, **kwargs)
                except (RuntimeError, NotImplementedError, IndexError):
                    continue  # zeros, or the smaller size, are not to its taste
                storages = [leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
                kept[call.key] = sum({one.data_ptr(): one.nbytes() for one in storages}.values())
                del result, args, kwargs
        for key, size in kept.items():
            self.ran[key] = max(0, profiled.peaks[key] - size)


def _extended(points: list[tuple[int, int]], size: int) -> int:
    """Where the line through one or two points (bytes of tensors, bytes of scratch) is at ``size``; 0 without any."""
    if not points:
        return 0
    size_one, taken = points[0]
    if len(points) == 1 or size == size_one:
        return taken
    size_two, less = points[1]
    slope = (taken - less) / (size_one - size_two) if size_one > size_two else 0.0
    return int(max(0.0, taken + slope * (size - size_one)))


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Keep torch's profiler, which writes two lines by itself, from the terminal."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
