"""Measure selective backprop: as many steps of a Vision Transformer, and of a byte-level GPT, some on half of a batch.

python benchmark.py --size cpu --out ../../benchmarks/cpu-2core
"""

import sys

from eke_bench import Benchmark, main_of

WINDOW = {"half, every second step of the window": {"selective_backprop": {}}}
ALWAYS = {"half, every step": {"selective_backprop": {"start": 0.0, "end": 1.0, "interrupt": 0}}}

SELECTED = Benchmark("selective_backprop", {**WINDOW, **ALWAYS}, workload="vit", shape="deep")
SEQUENCES = Benchmark("selective_backprop", WINDOW)

if __name__ == "__main__":
    sys.exit(main_of(SELECTED, SEQUENCES))
