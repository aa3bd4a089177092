"""What the report itself costs: the same run with it and without it.

python benchmark.py --size cpu --out ../../benchmarks/cpu-2core
"""

import sys

from eke_bench import Benchmark, main_of

REPORT = Benchmark("report", {"report": {"report": {"file": "", "ceilings": False}}}, claim="same mathematics")

if __name__ == "__main__":
    sys.exit(main_of(REPORT))
