"""Measure importance sampling: as many steps of a Vision Transformer, each on half of its batch.

Or on whole batches of samples that are drawn by what was seen of them before. And of a byte-level GPT, by the loss of
a sequence.

python benchmark.py --size cpu --out ../../benchmarks/cpu-2core
"""

import sys

from eke_bench import Benchmark, main_of

DRAWN = Benchmark(
    "importance_sampling",
    variants={
        "half, when it pays": {"importance_sampling": {"keep": 0.5}},
        "half, always": {"importance_sampling": {"keep": 0.5, "threshold": 0.0}},
        "RAIS": {"rais": {}},
    },
    controls={"half, as it comes": {"importance_sampling": {"keep": 0.5, "threshold": 1e9}}},
    workload="vit",
    shape="deep",
)

SEQUENCES = Benchmark(
    "importance_sampling",
    variants={"half, always, by the loss": {"importance_sampling": {"keep": 0.5, "by": "loss", "threshold": 0.0}}},
    controls={"half, as it comes": {"importance_sampling": {"keep": 0.5, "by": "loss", "threshold": 1e9}}},
)

if __name__ == "__main__":
    sys.exit(main_of(DRAWN, SEQUENCES))
