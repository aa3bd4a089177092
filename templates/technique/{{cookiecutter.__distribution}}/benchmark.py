"""Measure {{ cookiecutter.class_name }} against a tuned baseline, a smaller model and an A/A control.

    pip install -e .[bench]
    python benchmark.py                           # seconds: shows that it runs, says nothing else
    python benchmark.py --size cpu --out results  # an hour of one core; goes on where it was stopped
"""

import sys

from eke_bench import Benchmark, main_of

BENCHMARK = Benchmark("{{ cookiecutter.__entry }}", {"{{ cookiecutter.technique }}": {"{{ cookiecutter.__entry }}": {}}})

if __name__ == "__main__":
    sys.exit(main_of(BENCHMARK))
