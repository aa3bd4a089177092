"""Measure selective backprop: as many steps of a Vision Transformer, and of a byte-level GPT, some on half of a batch.

python benchmark.py --size cpu --out ../../benchmarks/cpu-2core
"""

import sys

from eke_bench import Benchmark, main_of

SELECTED = Benchmark(
    "selective_backprop",
    variants={
        "half, every second step of the window": {"selective_backprop": {}},
        "half, every step": {"selective_backprop": {"start": 0.0, "end": 1.0, "interrupt": 0}},
    },
    workload="vit",
    shape={"smoke": {"blocks": 2, "width": 32}, "cpu": {"blocks": 4, "width": 64}, "gpu": {"blocks": 6, "width": 192}},
    smaller={
        "smoke": {"blocks": 1, "width": 32},
        "cpu": {"blocks": 2, "width": 64},
        "gpu": {"blocks": 3, "width": 192},
    },
)

SEQUENCES = Benchmark(
    "selective_backprop",
    variants={"half, every second step of the window": {"selective_backprop": {}}},
    shape={"smoke": {"blocks": 2, "width": 32}, "cpu": {"blocks": 2, "width": 64}, "gpu": {"blocks": 8, "width": 512}},
    smaller={
        "smoke": {"blocks": 1, "width": 32},
        "cpu": {"blocks": 1, "width": 64},
        "gpu": {"blocks": 4, "width": 512},
    },
)

if __name__ == "__main__":
    sys.exit(main_of(SELECTED, SEQUENCES))
