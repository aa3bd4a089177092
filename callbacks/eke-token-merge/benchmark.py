"""Measure TokenMerge: steps that join patches of 196, and whole runs of a Vision Transformer.

python benchmark.py --size cpu --out ../../benchmarks/cpu-2core
"""

import sys

from eke_bench import Benchmark, Timing, main_of
from eke_bench.steps import intercepted, untouched, vision_model
from eke_token_merge import TokenMerge
from eke_token_merge.callback import Merge


def steps(size):
    """Training steps of a Vision Transformer with 6 blocks on 196 patches of real images, some joined in each block."""

    def join(count, proportional=True):
        technique = TokenMerge(count, prefix=1, proportional=proportional)
        state = {}  # of the list, which its blocks share
        return lambda number, block: [Merge(technique, state, block, number == 0)]

    ways = {
        "no patch joined": untouched,
        "12 joined a block": join(12),
        "24 joined a block": join(24),
        "24, not weighed by size": join(24, proportional=False),
    }
    return intercepted(*vision_model(size), ways)


STEP = Timing(
    "token_merge",
    "step with joined patches",
    steps,
    headline="a step of a 6-block ViT that joins 24 of 196 patches a block takes {2:.2f} of its time",
)
MERGE = Benchmark(
    "token_merge",
    variants={
        "12 a block": {"token_merge": {"count": 12}},
        "12 a block, tail 0.2": {"token_merge": {"count": 12, "tail": 0.2}},
    },
    workload="vit-fine",
)

if __name__ == "__main__":
    sys.exit(main_of(STEP, MERGE))
