"""Measure LengthWarmup: sequences cut or split while they grow, at a context of 512.

python benchmark.py --size cpu --out ../../benchmarks/cpu-2core
"""

import sys

from eke_bench import Benchmark, main_of

WARMUP = Benchmark(
    "length_warmup",
    variants={
        "truncate": {"length_warmup": {"start": 32}},
        "reshape": {"length_warmup": {"start": 32, "mode": "reshape"}},
    },
    workload="gpt-long",
)

if __name__ == "__main__":
    sys.exit(main_of(WARMUP))
