"""Measure TokenMerge: steps that join patches of 196, and whole runs of a Vision Transformer.

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
from eke_token_merge import TokenMerge
from eke_token_merge.callback import Merge

MOST = "24 joined a block"


def steps(size: str) -> dict[str, Callable[[], Any]]:
    """Training steps of a Vision Transformer with 6 blocks on 196 patches of real images, some joined in each block."""
    device = "cuda" if size == "gpu" else "cpu"
    torch.manual_seed(0)
    model = ConvViT(6, {"smoke": 32, "cpu": 128, "gpu": 768}[size], patch=2, lr=1e-4, steps=10**9).to(device)
    optimizer = model.configure_optimizers()["optimizer"]
    images, classes, _, _ = digits()
    batch = images[: 16 if size != "gpu" else 256].to(device), classes[: 16 if size != "gpu" else 256].to(device)
    interceptor.attach(model.blocks, "benchmark")

    def step(count: int, proportional: bool = True) -> None:
        technique = TokenMerge(count, prefix=1, proportional=proportional)
        for number, block in enumerate(model.blocks):
            interceptor.put(block, "benchmark", *([Merge(technique, block, number == 0)] if count else []))
        model.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return {
        "no patch joined": lambda: step(0),
        "12 joined a block": lambda: step(12),
        MOST: lambda: step(24),
        "24, not weighed by size": lambda: step(24, proportional=False),
    }


def headline(summary: Mapping[str, Any]) -> str:
    ratio = summary["timing"][MOST]["ratio"][0]
    return f"a step of a 6-block ViT that joins 24 of 196 patches a block takes {ratio:.2f} of its time"


MERGE = Benchmark(
    "token_merge",
    variants={
        "12 a block": {"token_merge": {"count": 12}},
        "12 a block, tail 0.2": {"token_merge": {"count": 12, "tail": 0.2}},
    },
    workload="vit-fine",
)

if __name__ == "__main__":
    sys.exit(main_of(Timing("token_merge", "step with joined patches", steps, headline=headline), MERGE))
