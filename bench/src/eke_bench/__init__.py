"""The standard benchmark of efficient Transformer training."""

from eke_bench.benchmark import Benchmark
from eke_bench.cli import main_of
from eke_bench.named import Runs
from eke_bench.stats import interleaved
from eke_bench.timing import Timing

__all__ = ["Benchmark", "Runs", "Timing", "interleaved", "main_of"]
