"""Counting what a step costs: memory by cause, bytes held for backward, FLOPs, Python calls and operators.

Counts, not clocks: they come out the same on every run, so a test may ask for equality. They slow a step
down; never time one while counting.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from eke import compat

CAUSES = ("parameters", "buffers", "gradients", "activations", "temporary", "optimizer")


def memory_peak(step: Callable[[], Any], module: nn.Module, *optimizers: Optimizer) -> dict[str, int]:
    """Bytes in use at the peak of one step, by cause, as the allocator would count them.

    Works on every device, the CPU too. Process memory (RSS) on a CPU is 1.3 to 4 times this, by fragmentation.

    Args:
        step: Runs one training step; forward, backward and the optimizer.
        module: The model, whose parameters, gradients and buffers are told apart.
        optimizers: Theirs are the optimizer states. States that exist before the step count as well.

    Returns:
        Each of :data:`CAUSES` to its bytes at the moment of the highest total, and ``"total"``.
    """
    with tracked_memory(module, *optimizers) as peak:
        step()
    return peak


@contextmanager
def tracked_memory(module: nn.Module, *optimizers: Optimizer) -> Iterator[dict[str, int]]:
    """:func:`memory_peak` of what runs inside the block.

    Yields:
        A dictionary that is filled when the block ends.
    """
    result: dict[str, int] = {}
    tracker = compat.MemTracker()
    tracker.track_external(module, *optimizers)
    with tracker:
        yield result
    peak: Counter[str] = Counter()
    for by_cause in tracker.get_tracker_snapshot("peak").values():
        for cause, size in by_cause.items():
            peak[_CAUSE_OF.get(str(getattr(cause, "value", cause)), "total")] += size
    result.update({cause: peak[cause] for cause in (*CAUSES, "total")})


@contextmanager
def allocator_peak() -> Iterator[Callable[[], dict[str, int]]]:
    """Count bytes that torch's allocator has handed out at their peak, over those at some moment in the block.

    Unlike :func:`memory_peak` it sees what kernels take for themselves, and C++ code such as DDP's, and does not see
    what for. On a CPU it sees the release only of what was allocated in the block: let a whole step go by first.

    Yields:
        A function to be called at the moment from which the peak counts. It returns a dictionary whose ``"bytes"`` is
        right when the block ends.
    """
    result = {"bytes": 0}
    if torch.cuda.is_available():

        def begin_on_card() -> dict[str, int]:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            result["from"] = torch.cuda.memory_allocated()
            return result

        yield begin_on_card
        torch.cuda.synchronize()
        result["bytes"] = torch.cuda.max_memory_allocated() - result.pop("from", 0)
        return

    with compat.memory_profile() as profiled, ExitStack() as stack:

        def begin() -> dict[str, int]:
            stack.enter_context(profiled.part("peak"))
            return result

        yield begin
    result["bytes"] = profiled.peaks.get("peak", 0)


_CAUSE_OF = {
    "Parameter": "parameters",
    "Buffer": "buffers",
    "Gradient": "gradients",
    "Activation": "activations",
    "Temp": "temporary",
    "Optstate": "optimizer",
    "Total": "total",
}


@contextmanager
def saved_bytes(module: nn.Module) -> Iterator[dict[str, int]]:
    """Count bytes that autograd keeps between forward and backward.

    Each storage counts once, however many views of it are kept (the three of a fused QKV, say). Parameters and
    buffers of ``module`` do not count.

    Yields:
        A dictionary whose ``"bytes"`` is right when the block ends.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    held: dict[int, int] = {}
    result = {"bytes": 0}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield result
    result["bytes"] = sum(held.values())


class OperatorCounter(TorchDispatchMode):
    """Counts the ATen operators that run inside it, backward and optimizer included.

    Attributes:
        counts: Operator name to how often it ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def count_flops() -> Iterator[dict[str, int]]:
    """Count the floating-point operations of matrix products, convolutions and attention inside the block.

    A product of (n, k) by (k, m) counts 2 n k m. Attention counts its two products over all pairs of positions, causal
    or not, and twice that for backward: the products that a fused kernel computes a second time during backward do
    not count, so that all kernels of attention come to the same number. What activation checkpointing computes again
    does count. Inside compiled code nothing is seen.

    Yields:
        A dictionary whose ``"flops"`` is right when the block ends.
    """
    result = {"flops": 0}
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
        yield result
    result["flops"] = counter.get_total_flops()


def _attention_forward(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    (batch, heads, length, width), (others, depth) = query, value[-2:]
    return 2 * batch * heads * length * others * (width + depth)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _attention_forward(query, key, value)


# torch counts nothing for the kernel that it takes on a CPU, and recomputation for those that it takes on a GPU.
_ATTENTION = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}{ending}"): count
    for kernel, backward in (
        ("flash_attention_for_cpu", "flash_attention_for_cpu_backward"),
        ("flash_attention", "flash_attention_backward"),
        ("efficient_attention", "efficient_attention_backward"),
        ("cudnn_attention", "cudnn_attention_backward"),
    )
    for ending, count in (("", _attention_forward), (backward.removeprefix(kernel), _attention_backward))
}


def ceilings(device: str | torch.device = "cpu", seconds: float = 1.0) -> dict[str, dict[str, float]]:
    """What this machine can do at best, now: the yardstick of a utilization.

    Square matrix products in float32 and bfloat16 (n = 1024 on a CPU, less where that takes longer than ``seconds``,
    8192 on a GPU), and a copy of 256 MiB (1 GiB),
    each repeated for ``seconds``.

    Args:
        device: Where to measure, with the threads that torch has at the moment.
        seconds: For each of them.

    Returns:
        ``"float32"`` and ``"bfloat16"`` to FLOP/s, ``"copy"`` to bytes read and written per second; each as ``"best"``
        and as ``"median"``, which is below the best where others want the machine too.
    """
    device = torch.device(device)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        side = 1024 if device.type == "cpu" else 8192
        while device.type == "cpu" and side > 64 and 2 * side**3 > speed(dtype) * seconds:
            side //= 2  # a processor that lacks instructions for a dtype would be at one product for minutes
        a, b = torch.randn(2, side, side, device=device).to(dtype)  # zeros would run faster on a GPU
        found[str(dtype).removeprefix("torch.")] = _rate(partial(torch.mm, a, b), 2 * side**3, device, seconds)
    source = torch.randn((64 if device.type == "cpu" else 256) * 2**20, device=device)
    target = torch.empty_like(source)
    found["copy"] = _rate(partial(target.copy_, source), 2 * source.nbytes, device, seconds)
    return found


@cache
def speed(dtype: torch.dtype) -> float:
    """Floating-point operations a second of this machine's CPU in small matrix products of a dtype; asked once.

    A processor without instructions for bfloat16 is some hundred times slower at it than at float32: 0.13 GFLOP/s
    beside 34. Where much would be computed in such a dtype, ask first.
    """
    side = 64
    a, b = torch.ones(2, side, side).to(dtype)
    return _rate(partial(torch.mm, a, b), 2 * side**3, torch.device("cpu"), 0.005)["best"]


def _rate(work: Callable[[], Any], amount: float, device: torch.device, seconds: float) -> dict[str, float]:
    """``amount`` per second, of the best and of the middle repetition."""
    taken: list[float] = []
    work()
    end = perf_counter() + seconds
    while len(taken) < 3 or perf_counter() < end:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(perf_counter() - start)
    return {"best": amount / min(taken), "median": amount / median(taken)}


@contextmanager
def python_calls() -> Iterator[dict[str, int]]:
    """Count Python and C function calls of this thread inside the block.

    Yields:
        A dictionary whose ``"calls"`` is right when the block ends.
    """
    result = {"calls": 0}

    def count(frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            result["calls"] += 1

    before, collects = sys.getprofile(), gc.isenabled()
    gc.disable()  # finalizers of what ran earlier would be counted, whenever the collector happens to come by
    sys.setprofile(count)
    try:
        yield result
    finally:
        sys.setprofile(before)
        if collects:
            gc.enable()
        result["calls"] -= 4  # leaving the block: __exit__, next, this generator, setprofile
