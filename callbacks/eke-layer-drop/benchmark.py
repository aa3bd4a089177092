"""Measure LayerDrop: a step at half of the layers, and both schedules at equal cost, with a shallower control.

python benchmark.py --size cpu --out ../../benchmarks/cpu-2core
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from eke.seams import interceptor
from eke_bench import Benchmark, Timing, main_of
from eke_bench.workloads import load
from eke_layer_drop.callback import Rescale, Skip

HALF = "half of the blocks, rescaled"


def steps(size: str) -> dict[str, Callable[[], Any]]:
    """Training steps of a 12-block GPT, of which all blocks or the first half run."""
    workload = load("gpt", size)
    device = "cuda" if size == "gpu" else "cpu"
    torch.manual_seed(0)
    model = workload.model({"blocks": 12, "width": {"smoke": 32, "cpu": 128, "gpu": 512}[size]}, 1e-4, 10**9).to(device)
    optimizer = model.configure_optimizers()["optimizer"]
    batch = next(iter(workload.train_loader(seed=0))).to(device)
    interceptor.attach(model.blocks, "benchmark")

    def step(run: int, *actions: interceptor.Action) -> None:
        for number, block in enumerate(model.blocks):
            interceptor.put(block, "benchmark", *(actions if number < run else (Skip(),)))
        model.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"all blocks": lambda: step(12), HALF: lambda: step(6, Rescale(0.5))}


def headline(summary: Mapping[str, Any]) -> str:
    return (
        f"a step of a 12-block GPT with half of its blocks takes {summary['timing'][HALF]['ratio'][0]:.2f} of its time"
    )


DROP = Benchmark(
    "layer_drop",
    variants={
        "progressive": {"layer_drop": {}},
        "constant, keep 0.8": {"layer_drop": {"schedule": "constant", "keep": 0.8}},
    },
    # To be dropped, layers have to be there: the depth is given.
    shape={"smoke": {"blocks": 4, "width": 32}, "cpu": {"blocks": 4, "width": 64}, "gpu": {"blocks": 24, "width": 512}},
    smaller={
        "smoke": {"blocks": 2, "width": 32},
        "cpu": {"blocks": 2, "width": 64},
        "gpu": {"blocks": 12, "width": 512},
    },
)

if __name__ == "__main__":
    sys.exit(main_of(Timing("layer_drop", "step at half depth", steps, headline=headline), DROP))
