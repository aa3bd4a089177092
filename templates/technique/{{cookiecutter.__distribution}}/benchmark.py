"""Prints what a step costs without {{ cookiecutter.class_name }} and with it; ``--output FILE`` also writes it as JSON."""

from __future__ import annotations

import argparse
import json
import time
from statistics import median

import torch
from eke.testing import TinyTransformer, fit
from {{ cookiecutter.__module }} import {{ cookiecutter.class_name }}

ROUNDS, STEPS = 6, 50


def milliseconds(*techniques: object) -> float:
    """Time of one step, the start of the run included."""
    start = time.perf_counter()
    fit(TinyTransformer(), *techniques, epochs=1, steps=STEPS)
    return 1000 * (time.perf_counter() - start) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", metavar="FILE")
    output = parser.parse_args().output
    torch.set_num_threads(1)
    pairs = [(milliseconds(), milliseconds({{ cookiecutter.class_name }}())) for _ in range(ROUNDS)][1:]  # the first warms up
    without, with_it = (median(column) for column in zip(*pairs, strict=True))
    headline = f"a step of a tiny model takes {with_it / without:.2f} times as long"
    print(f"| one CPU thread, median of {len(pairs)} | step |\n| --- | --- |")
    print(f"| without | {without:.2f} ms |\n| `{{ cookiecutter.class_name }}()` | {with_it:.2f} ms |\n\n{headline}")
    if output:
        with open(output, "w") as file:
            json.dump({"headline": headline, "without_ms": without, "with_ms": with_it}, file, indent=2)


if __name__ == "__main__":
    main()
