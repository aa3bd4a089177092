"""Measure LayerDrop: a step at half of the layers, and both schedules at equal cost, with a shallower control.

python benchmark.py --size cpu --out ../../benchmarks/cpu-2core
"""

import sys

from eke.seams.interceptor import Skip
from eke_bench import Benchmark, Timing, main_of
from eke_bench.steps import intercepted, language_model, untouched
from eke_layer_drop.callback import Rescale


def steps(size):
    """Training steps of a 12-block GPT, of which all blocks or the first half run."""

    def half(number, block):
        return [Rescale(0.5) if number < 6 else Skip()]

    return intercepted(
        *language_model(size, blocks=12), {"all blocks": untouched, "half of the blocks, rescaled": half}
    )


STEP = Timing(
    "layer_drop",
    "step at half depth",
    steps,
    headline="a step of a 12-block GPT with half of its blocks takes {1:.2f} of its time",
)
DROP = Benchmark(
    "layer_drop",
    variants={
        "progressive": {"layer_drop": {}},
        "constant, keep 0.8": {"layer_drop": {"schedule": "constant", "keep": 0.8}},
    },
    shape="deep",  # to be dropped, layers have to be there
)

if __name__ == "__main__":
    sys.exit(main_of(STEP, DROP))
