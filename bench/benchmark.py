"""Who trains the same model from the same seed, and what a step costs with each of them.

python benchmark.py --size cpu --out ../benchmarks/cpu-2core
"""

import sys

from eke_bench import Benchmark, main_of

TRAINERS = Benchmark(
    "trainers",
    {"Lightning": {}},
    claim="same mathematics",
    subjects={"Hugging Face Trainer": "hf", "DeepSpeed, ZeRO 0": "deepspeed"},
    baseline="hand",
)

if __name__ == "__main__":
    sys.exit(main_of(TRAINERS))
