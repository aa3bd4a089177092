"""Measure Resolution: images that grow and patches that shrink, with a Vision Transformer.

python benchmark.py --size cpu --out ../../benchmarks/cpu-2core
"""

import sys

from eke_bench import Benchmark, main_of

GROW = Benchmark(
    "resolution",
    variants={
        "images from half": {"resolution": {"start": 0.5}},
        "patches from twice": {"resolution": {"start": 0.5, "mode": "patches"}},
    },
    workload="vit-fine",
)

if __name__ == "__main__":
    sys.exit(main_of(GROW))
