"""What a fuzzer prints: a line for each case, a table, and a script for each that failed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pprint import pformat

from eke.testing.fuzz.case import Case
from eke.testing.fuzz.execute import Outcome, try_case


def line(seed: int, case: Case, outcome: Outcome) -> str:
    """``seed 17  1.2 s  held  TinyBlocks: stacking | accumulate=2 | way='steps' every=1``."""
    return f"seed {seed:<6} {outcome.seconds:5.1f} s  {outcome.kind:<22}  {case}"


def table(outcomes: Iterable[tuple[int, Outcome]]) -> str:
    """How many cases ended how, with the seeds of those that failed."""
    outcomes = list(outcomes)
    counts = Counter(outcome.kind for _, outcome in outcomes)
    lines = [f"{'ended':<24} cases  seeds"]
    for kind, count in sorted(counts.items(), key=lambda pair: (not Outcome(pair[0]).sound, -pair[1])):
        seeds = [str(seed) for seed, outcome in outcomes if outcome.kind == kind and not outcome.sound]
        lines.append(f"{kind:<24} {count:5}  {' '.join(seeds)}".rstrip())
    seconds = sorted(outcome.seconds for _, outcome in outcomes) or [0.0]
    middle = seconds[len(seconds) // 2]
    lines.append(f"{len(outcomes)} cases, {sum(seconds):.0f} s of processor time, the median {middle:.1f} s")
    return "\n".join(lines)


def script(case: Case, outcome: Outcome, seed: int | None = None) -> str:
    """A file that runs the case again and says how it ends."""
    found = "\n".join(f"# {one}".rstrip() for one in outcome.words.splitlines()[-12:])
    where = f", seed {seed}, made smaller" if seed is not None else ""
    fields = ",\n".join(
        f"    {name}={_literal(getattr(case, name))}" for name in ("model", "techniques", "options", "save")
    )
    return (
        f"# Found by python -m eke.testing.fuzz{where}: {outcome.kind}\n{found}\n"
        f"from eke.testing.fuzz import Case, try_and_say\n\n"
        f"case = Case(\n{fields},\n)\n\n"
        'if __name__ == "__main__":\n    try_and_say(case)\n'
    )


def try_and_say(case: Case, show: Callable[[str], None] = print) -> None:
    """Run a case and print how it ended; ends Python with 1 where it failed."""
    outcome = try_case(case)
    show(str(case))
    show(f"{outcome.kind}\n{outcome.words}".rstrip())
    if not outcome.sound:
        raise SystemExit(1)


def record(seed: int, case: Case, outcome: Outcome) -> str:
    """One line of JSON, for ``--out``."""
    return json.dumps({"seed": seed, "kind": outcome.kind, "words": outcome.words, "seconds": round(outcome.seconds, 2),
                       "case": asdict(case)})  # fmt: skip


def failed(text: str) -> list[tuple[int, Case]]:
    """Seed and case of the lines of :func:`record` that failed: what to try again once something is mended."""
    found = [json.loads(line) for line in text.splitlines()]
    return [(one["seed"], Case(**one["case"])) for one in found if not Outcome(one["kind"]).sound]


def _literal(value: object) -> str:
    return pformat(dict(value) if isinstance(value, dict) else value, width=100, sort_dicts=False).replace(
        "\n", "\n    "
    )
