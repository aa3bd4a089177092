"""Measure InfoBatch: as many steps on a Vision Transformer, of which those in the middle see chosen samples.

python benchmark.py --size cpu --out ../../benchmarks/cpu-2core
"""

import sys

from eke_bench import Benchmark, main_of

CHOSEN = Benchmark(
    "infobatch",
    variants={"half": {"infobatch": {}}, "half, from epoch 8": {"infobatch": {"start": 8}}},
    workload="vit",
    shape="deep",
)

if __name__ == "__main__":
    sys.exit(main_of(CHOSEN))
