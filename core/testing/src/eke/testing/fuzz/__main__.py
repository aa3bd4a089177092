"""``python -m eke.testing.fuzz --minutes 5 --seed N``: try random runs, and print a script for each that fails."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from itertools import count
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Returns 1 where a case failed."""
    parser = argparse.ArgumentParser(prog="python -m eke.testing.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the next has one more")
    parser.add_argument("--minutes", type=float, help="how long new cases are begun (5 where --cases is not given)")
    parser.add_argument("--cases", type=int, help="how many cases")
    parser.add_argument("--technique", action="append", default=[], metavar="NAME",
                        help="every case has it; module:Class for one that is not installed")  # fmt: skip
    parser.add_argument("--alone", action="store_true", help="cases have those techniques and no others")
    parser.add_argument("--way", action="append", default=[], help="leave out cases that save otherwise")
    parser.add_argument("--no-shrink", action="store_true", help="print the case that failed as it was drawn")
    parser.add_argument("--out", type=Path, help="add a line of JSON for each case to this file")
    parser.add_argument(
        "--again", type=Path, metavar="FILE", help="the cases of such a file that failed, and no others"
    )
    given = parser.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print("importing torch and all techniques ...", flush=True)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)

    from eke.testing.fuzz import draw_case, script, shrink, try_case
    from eke.testing.fuzz.report import failed, line, record, table

    names = given.technique if given.alone else None
    cases = ((seed, draw_case(seed, names, given.technique)) for seed in count(given.seed))
    if given.again:
        cases = iter(failed(given.again.read_text()))
    minutes = given.minutes or (5.0 if given.cases is None and not given.again else 1e6)
    end, outcomes = time.monotonic() + 60 * minutes, []
    for seed, case in cases:
        if given.way and case.save["way"] not in given.way:
            continue
        outcome = try_case(case)
        outcomes.append((seed, outcome))
        print(line(seed, case, outcome), flush=True)
        if given.out:
            with given.out.open("a") as file:
                file.write(record(seed, case, outcome) + "\n")
        if not outcome.sound:
            smallest = (case, outcome) if given.no_shrink else shrink(case, outcome)
            print("\n" + script(*smallest, seed=seed), flush=True)
        if time.monotonic() > end or len(outcomes) == given.cases:
            break
    print(table(outcomes))
    return int(any(not outcome.sound for _, outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
