"""Measure Stacking: ways to grow a byte-level GPT to its full depth, with the controls that growth has to beat.

python benchmark.py --size cpu --out ../../benchmarks/cpu-2core
"""

import sys

from eke_bench import Benchmark, main_of

STACKING = Benchmark(
    "stacking",
    variants={
        "stack": {"stacking": {"stages": [0.3]}},
        "interleave": {"stacking": {"stages": [0.3], "operator": "interleave"}},
        "identity": {"stacking": {"stages": [0.3], "operator": "identity"}},
    },
    controls={"random start": {"stacking": {"stages": [0.3], "operator": "random"}}},
    shape="deep",  # growth is for models whose depth is given: at the reference depth there is little to grow to
)

if __name__ == "__main__":
    sys.exit(main_of(STACKING))
