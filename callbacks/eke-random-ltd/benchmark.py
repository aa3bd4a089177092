"""Measure RandomLTD: a middle block on half and a quarter of the tokens, and whole runs at contexts of 512 and 128.

python benchmark.py --size cpu --out ../../benchmarks/cpu-2core
"""

import sys

from eke.seams.interceptor import Select
from eke_bench import Benchmark, Timing, main_of
from eke_bench.steps import intercepted, language_model, untouched
from eke_random_ltd.callback import Choose, Side


def steps(size):
    """Training steps of a 6-block GPT at a context of 512, of which the middle blocks see some tokens."""
    model, batch = language_model(size, blocks=6, workload="gpt-long")

    def on(share):
        def select(number, block):
            choose = Choose(0.0, share, 8, seed=number)
            return [Select(choose, Side(block, choose))] if 0 < number < len(model.blocks) - 1 else []

        return select

    ways = {"all tokens": untouched, "half of the tokens": on(0.5), "a quarter of them": on(0.25)}
    return intercepted(model, batch, ways)


STEP = Timing(
    "random_ltd",
    "step on fewer tokens",
    steps,
    headline="a step of a 6-block GPT whose middle blocks see half of 512 tokens takes {1:.2f} of its time",
)
VARIANTS = {"from a quarter": {"random_ltd": {"start": 0.25}}, "from half": {"random_ltd": {"start": 0.5}}}
# With three blocks or fewer hardly any drops tokens: the depth is given.
LONG = Benchmark("random_ltd", VARIANTS, workload="gpt-long", shape="deep", smaller="reference")
DEEP = Benchmark("random_ltd", VARIANTS, shape="deep")

if __name__ == "__main__":
    sys.exit(main_of(STEP, LONG, DEEP))
