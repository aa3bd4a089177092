"""Measure Adam8bit: time of a step and bytes of state beside other AdamWs, error of an update, and whole runs.

python benchmark.py --size cpu --out ../../benchmarks/cpu-2core
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache, partial
from typing import Any

import torch
from eke_adam8bit import AdamW8bit, eight_bit, state_bytes
from eke_bench import Benchmark, Timing, main_of
from eke_bench.workloads import load
from torch import Tensor, nn
from torch.optim import Optimizer

FUSED, OURS, BITSANDBYTES = "torch AdamW, fused", "AdamW8bit", "bitsandbytes AdamW8bit"


class Nearest(AdamW8bit):
    """AdamW8bit without its sequence of thresholds, to show what that does."""

    def _step_8bit(self, p: Tensor, state: dict, group: dict, knobs: dict) -> None:
        from eke_adam8bit import optimizer as ours

        key = (id(group), int(state["step"]) + 1, p.device)
        if key not in knobs:
            knobs[key] = ours._knobs(key[1], group)
            knobs[key][: ours.BLOCK] = 0
        super()._step_8bit(p, state, group, knobs)


BUILDERS: dict[str, Callable[..., Optimizer]] = {
    FUSED: partial(torch.optim.AdamW, fused=True),
    "torch AdamW, default": torch.optim.AdamW,
    OURS: AdamW8bit,
    "AdamW8bit, not compiled": partial(AdamW8bit, compile=False),
    "AdamW8bit, nearest code, not compiled": partial(Nearest, compile=False),
    BITSANDBYTES: lambda params, **settings: eight_bit(
        torch.optim.AdamW(params, **settings), backend="bitsandbytes", min_elements=0
    ),
}


def each(params: Callable[[], list[nn.Parameter]], **settings: float) -> dict[str, Optimizer]:
    """Every optimizer over parameters of its own; one whose library is missing is left out."""
    found = {}
    for label, build in BUILDERS.items():
        torch.manual_seed(0)
        with suppress(ImportError):
            found[label] = build(params(), **settings)
    return found


def stepping(params: Callable[[], list[nn.Parameter]]) -> dict[str, Callable[[], Any]]:
    def with_gradients() -> list[nn.Parameter]:
        weights = params()
        for weight in weights:
            weight.grad = torch.randn_like(weight) * 1e-3
        return weights

    return {label: optimizer.step for label, optimizer in each(with_gradients, lr=1e-3).items()}


def gpt(size: str) -> dict[str, Callable[[], Any]]:
    blocks, width = {"smoke": (1, 64), "cpu": (6, 256), "gpu": (12, 1024)}[size]
    shape, device = {"blocks": blocks, "width": width}, "cuda" if size == "gpu" else "cpu"
    return stepping(lambda: list(load("gpt", size).model(shape, lr=0.0, steps=1).to(device).parameters()))


def one_tensor(size: str) -> dict[str, Callable[[], Any]]:
    rows, columns = {"smoke": (64, 128), "cpu": (2560, 4096), "gpu": (8192, 16384)}[size]
    device = "cuda" if size == "gpu" else "cpu"
    return stepping(lambda: [nn.Parameter(torch.randn(rows, columns, device=device))])


def facts(label: str, step: Callable[[], Any], size: str) -> dict[str, Any]:
    optimizer = step.__self__
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    return {
        "state, bytes a parameter": state_bytes(optimizer) / sum(weight.numel() for weight in weights),
        "off the 32-bit update": errors(size)[label],
    }


@cache
def errors(size: str) -> dict[str, float]:
    """Relative distance of each optimizer's updates from the 32-bit ones, on the gradients of one 32-bit run.

    The mean of the last 20 steps. Embeddings and small tensors, which stay in 32 bits, are left out.
    """
    workload = load("gpt", size)
    torch.manual_seed(0)
    model = workload.model(workload.size.shape, lr=1e-3, steps=10**9)
    watched = [weight for name, weight in model.named_parameters() if weight.numel() >= 4096 and "embed" not in name]
    driver = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batches = iter(workload.train_loader(seed=0))
    followers = each(lambda: [nn.Parameter(torch.zeros_like(p)) for p in watched], lr=1.0, weight_decay=0.0)
    steps = 25 if size == "smoke" else 300
    found: dict[str, list[float]] = {label: [] for label in followers}
    for number in range(steps):
        driver.zero_grad()
        model.loss(next(batches)).backward()
        moves = {}
        for label, follower in followers.items():
            mine = follower.param_groups[0]["params"]
            for weight, source in zip(mine, watched, strict=True):
                weight.data.zero_()
                weight.grad = source.grad.clone()
            follower.step()
            moves[label] = torch.cat([weight.detach().flatten() for weight in mine])
        for label, move in moves.items():
            if number >= steps - 20:
                found[label].append(float((move - moves[FUSED]).norm() / moves[FUSED].norm()))
        driver.step()
    return {label: statistics.fmean(values) for label, values in found.items()}


def headline(summary: Mapping[str, Any]) -> str:
    ours, other = summary["timing"][OURS], summary["timing"].get(BITSANDBYTES)
    text = (
        f"{ours['facts']['state, bytes a parameter']:.2f} bytes of state a parameter in place of 8; the optimizer's "
        f"step takes {ours['ratio'][0]:.1f} times that of fused AdamW"
    )
    return f"{text} (bitsandbytes: {other['ratio'][0]:.0f})" if other else text


OVER_GPT = Timing("adam8bit", "step over a GPT", gpt, facts, rounds=60, headline=headline)
OVER_ONE = Timing("adam8bit", "step over one tensor", one_tensor, facts, rounds=60)
RUNS = Benchmark(
    "adam8bit", {"adam8bit": {"adam8bit": {}}}, claim="less memory", subjects={"bitsandbytes": "bitsandbytes"}
)

if __name__ == "__main__":
    sys.exit(main_of(OVER_GPT, OVER_ONE, RUNS))
