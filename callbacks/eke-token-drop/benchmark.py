"""Measure TokenDrop: steps on fewer of 196 patches, and whole runs of a Vision Transformer.

python benchmark.py --size cpu --out ../../benchmarks/cpu-2core
"""

import sys

from eke_bench import Benchmark, Timing, main_of
from eke_bench.steps import intercepted, untouched, vision_model
from eke_token_drop.callback import LeaveOut


def steps(size):
    """Training steps of a Vision Transformer on 196 patches of real images, of which some are left out."""

    def keep(share):
        return lambda number, block: [LeaveOut(share, 0, 1, {})] if number == 0 else []

    ways = {"all patches": untouched, "half of the patches": keep(0.5), "a quarter of them": keep(0.25)}
    return intercepted(*vision_model(size), ways)


STEP = Timing(
    "token_drop",
    "step on fewer patches",
    steps,
    headline="a step of a 6-block ViT on half of 196 patches takes {1:.2f} of its time",
)
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
    sys.exit(main_of(STEP, DROP))
