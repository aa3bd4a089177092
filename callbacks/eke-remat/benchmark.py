"""Measure Remat: a training step of a 12-block GPT, its time and its peak, plain and recomputed in several ways.

python benchmark.py --size cpu --out ../../benchmarks/cpu-2core
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from eke import measure
from eke.seams.recompute import recompute, spans
from eke_bench import Timing, main_of
from eke_bench.workloads import load
from eke_remat import POLICIES

BLOCKS = 12
KINDS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "Remat()": {},
    "Remat(every=2)": {"every": 2},
    "Remat(span=2)": {"span": 2},
    "Remat('attention')": {"policy": "attention"},
    "Remat('every second')": {"policy": "every second"},
    "Remat('matmuls')": {"policy": "matmuls"},
}


def steps(size: str) -> dict[str, Callable[[], Any]]:
    """Training steps, each of a model of its own."""
    return {label: one_step(settings, size) for label, settings in KINDS.items()}


def one_step(settings: dict[str, Any] | None, size: str) -> Callable[[], Any]:
    workload = load("gpt", size)
    device = "cuda" if size == "gpu" else "cpu"
    torch.manual_seed(0)
    width = {"smoke": 32, "cpu": 128, "gpu": 1024}[size]
    model = workload.model({"blocks": BLOCKS, "width": width}, 1e-4, 10**9).to(device)
    optimizer = model.configure_optimizers()["optimizer"]
    batch = next(iter(workload.train_loader(seed=0))).to(device)
    if settings is not None:
        policy = POLICIES[settings["policy"]] if "policy" in settings else None
        regions = spans(BLOCKS, settings.get("span", 1), settings.get("every", 1))
        recompute(list(model.blocks), regions, policy=policy)

    def step() -> None:
        model.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    step.parts = model, optimizer  # for the memory
    return step


def memory(label: str, step: Any, size: str) -> dict[str, Any]:
    """Bytes of activations at the peak of a step, in MiB."""
    peak = measure.memory_peak(step, *step.parts)
    return {"peak, MiB": round((peak["activations"] + peak["temporary"]) / 2**20, 1)}


def headline(summary: Mapping[str, Any]) -> str:
    plain, remat = summary["timing"]["plain"], summary["timing"]["Remat()"]
    share = remat["facts"]["peak, MiB"] / plain["facts"]["peak, MiB"]
    return f"a step of a {BLOCKS}-block GPT holds {share:.2f} of its activations in {remat['ratio'][0]:.2f} of the time"


if __name__ == "__main__":
    sys.exit(main_of(Timing("remat", "step", steps, memory, headline=headline)))
