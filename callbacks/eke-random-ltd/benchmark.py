"""Measure RandomLTD: a middle block on half and a quarter of the tokens, and whole runs at contexts of 512 and 128.

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
from eke_random_ltd import RandomLTD
from eke_random_ltd.callback import Choose, Side

HALF = "half of the tokens"


def steps(size: str) -> dict[str, Callable[[], Any]]:
    """Training steps of a 6-block GPT at a context of 512, of which the middle blocks see some tokens."""
    workload = load("gpt-long", size)
    device = "cuda" if size == "gpu" else "cpu"
    torch.manual_seed(0)
    model = workload.model({"blocks": 6, "width": {"smoke": 32, "cpu": 128, "gpu": 512}[size]}, 1e-4, 10**9).to(device)
    optimizer = model.configure_optimizers()["optimizer"]
    batch = next(iter(workload.train_loader(seed=0))).to(device)
    middle = list(model.blocks)[1:-1]
    interceptor.attach(middle, "benchmark")

    def step(share: float) -> None:
        technique = RandomLTD(share, duration=2)
        technique._steps = 2
        for number, block in enumerate(middle):
            choose = Choose(technique, 0, number)
            interceptor.put(
                block, "benchmark", *([interceptor.Select(choose, Side(block, choose))] if share < 1 else [])
            )
        model.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"all tokens": lambda: step(1.0), HALF: lambda: step(0.5), "a quarter of them": lambda: step(0.25)}


def headline(summary: Mapping[str, Any]) -> str:
    ratio = summary["timing"][HALF]["ratio"][0]
    return f"a step of a 6-block GPT whose middle blocks see half of 512 tokens takes {ratio:.2f} of its time"


VARIANTS = {"from a quarter": {"random_ltd": {"start": 0.25}}, "from half": {"random_ltd": {"start": 0.5}}}

LONG = Benchmark(
    "random_ltd",
    variants=VARIANTS,
    workload="gpt-long",
    # With three blocks or fewer hardly any drops tokens: the depth is given.
    shape={"smoke": {"blocks": 4, "width": 32}, "cpu": {"blocks": 4, "width": 64}, "gpu": {"blocks": 24, "width": 512}},
)

DEEP = Benchmark(
    "random_ltd",
    variants=VARIANTS,
    shape={"smoke": {"blocks": 4, "width": 32}, "cpu": {"blocks": 4, "width": 64}, "gpu": {"blocks": 24, "width": 512}},
    smaller={
        "smoke": {"blocks": 2, "width": 32},
        "cpu": {"blocks": 2, "width": 64},
        "gpu": {"blocks": 12, "width": 512},
    },
)

if __name__ == "__main__":
    sys.exit(main_of(Timing("random_ltd", "step on fewer tokens", steps, headline=headline), LONG, DEEP))
