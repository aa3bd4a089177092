"""Measure TokenDrop: steps on fewer of 196 patches, and whole runs of a Vision Transformer.

python benchmark.py --size cpu --out ../../benchmarks/cpu-2core
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from eke.seams import interceptor
from eke_bench import Benchmark, Timing, main_of
from eke_bench.workloads.vit import ConvViT, digits
from eke_token_drop.callback import LeaveOut

HALF = "half of the patches"


def steps(size: str) -> dict[str, Callable[[], Any]]:
    """Training steps of a Vision Transformer on 196 patches of real images, of which some are left out."""
    device = "cuda" if size == "gpu" else "cpu"
    torch.manual_seed(0)
    model = ConvViT(6, {"smoke": 32, "cpu": 128, "gpu": 768}[size], patch=2, lr=1e-4, steps=10**9).to(device)
    optimizer = model.configure_optimizers()["optimizer"]
    images, classes, _, _ = digits()
    batch = images[: 16 if size != "gpu" else 256].to(device), classes[: 16 if size != "gpu" else 256].to(device)
    interceptor.attach([model.blocks[0]], "benchmark")

    def step(keep: float) -> None:
        interceptor.put(model.blocks[0], "benchmark", *([LeaveOut(keep, 0, 1, {})] if keep < 1 else []))
        model.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"all patches": lambda: step(1), HALF: lambda: step(0.5), "a quarter of them": lambda: step(0.25)}


def headline(summary: Mapping[str, Any]) -> str:
    return f"a step of a 6-block ViT on half of 196 patches takes {summary['timing'][HALF]['ratio'][0]:.2f} of its time"


DROP = Benchmark(
    "token_drop",
    variants={
        "half, tail 0.2": {"token_drop": {"drop": 0.5, "tail": 0.2}},
        "half, tail 0": {"token_drop": {"drop": 0.5, "tail": 0}},
        "linear from half": {"token_drop": {"drop": 0.5, "tail": 0.2, "schedule": "linear"}},
    },
    workload="vit-fine",
)

if __name__ == "__main__":
    sys.exit(main_of(Timing("token_drop", "step on fewer patches", steps, headline=headline), DROP))
