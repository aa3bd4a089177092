"""The standard benchmark of efficient Transformer training."""

from eke_bench.benchmark import Benchmark
from eke_bench.cli import main_of
from eke_bench.stats import interleaved

__all__ = ["Benchmark", "interleaved", "main_of"]
