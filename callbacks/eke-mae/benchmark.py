"""Measure MAE: its step against one that encodes all patches, and what pretraining gives beside training from scratch.

python benchmark.py --size cpu --out ../../benchmarks/cpu-2core
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import eke
import torch
from eke_bench import Benchmark, Timing, main_of
from eke_bench.workloads.vit import ConvViT, digits
from eke_mae import MAE

QUARTER = "a quarter of the patches encoded"


def steps(size: str) -> dict[str, Callable[[], Any]]:
    """Pretraining steps of a Vision Transformer on 196 patches of real images: encoder, two blocks of decoder at half
    of its width on all patches, and optimizer."""
    device = "cuda" if size == "gpu" else "cpu"
    torch.manual_seed(0)
    model = ConvViT(6, {"smoke": 32, "cpu": 128, "gpu": 768}[size], patch=2, lr=1e-4, steps=10**9).to(device)
    mae = MAE(0.75)
    mae.alter_model(eke.Run(mae, None, model))
    model.to(device)
    optimizer = model.configure_optimizers()["optimizer"]
    images = digits()[0][: 16 if size != "gpu" else 256].to(device)
    grid = (14, 14)

    def step(visible: int) -> None:
        order = torch.rand(len(images), 196, device=device).argsort(1)
        target, predicted = mae._mae(images, order, order[:, :visible], grid)
        (predicted - target).square().mean(-1).gather(1, order[:, 49:]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"all patches encoded": lambda: step(196), QUARTER: lambda: step(49)}


def headline(summary: Mapping[str, Any]) -> str:
    ratio = summary["timing"][QUARTER]["ratio"][0]
    return f"a pretraining step at 75 % hidden, decoder included, takes {ratio:.2f} of one that encodes all patches"


# Beside an encoder of two blocks, two blocks of decoder with four heads would cost more than masking saves.
LIGHT = {"decoder_depth": 1, "decoder_heads": 1}

PRETRAIN = Benchmark(
    "mae",
    variants={
        "a third of the steps": {"mae": {"duration": 0.33, **LIGHT}},
        "half": {"mae": {"duration": 0.5, **LIGHT}},
    },
    workload="vit-fine",
)

if __name__ == "__main__":
    sys.exit(main_of(Timing("mae", "step on visible patches", steps, headline=headline), PRETRAIN))
