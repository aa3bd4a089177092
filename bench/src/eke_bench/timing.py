"""Functions timed in turn: for what is a part of a step, such as an optimizer or a kernel."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from eke.spec import EkeError

from eke_bench.stats import interleaved
from eke_bench.store import environment


@dataclass(frozen=True)
class Timing:
    """Several ways of doing the same, one of them the baseline.

    Args:
        name: Of the technique.
        title: What is timed; part of the file name.
        build: ``build(size)`` gives label to function; the first is the baseline. A label whose library is missing is
            left out.
        facts: ``facts(label, function, size)`` gives what else is known of one, by name, such as bytes.
        rounds: In which each function runs once.
        headline: The sentence for the table of techniques, made from the summary, or a text in which ``{1:.2f}`` is the
            time of the second function over that of the first, ``{2:.2f}`` of the third, and so on.
    """

    name: str
    title: str
    build: Callable[[str], Mapping[str, Callable[[], Any]]]
    facts: Callable[[str, Callable[[], Any], str], dict[str, Any]] = lambda label, function, size: {}
    rounds: int = 40
    headline: Callable[[Mapping[str, Any]], str] | str = ""

    def stem(self, size: str) -> str:
        """File name without ending."""
        return f"{self.name}-{'-'.join(self.title.lower().split())}-{size}"

    def measure(self, size: str) -> dict[str, Any]:
        """Time them on one thread, processor time on a CPU and time by the clock on a GPU.

        Raises:
            EkeError: ``build`` gives nothing, because what it needs is not installed.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            functions = self.build(size)
            if not functions:
                raise EkeError(f"{self.title}: nothing to time here. What it needs is not installed.")
            rounds = 4 if size == "smoke" else self.rounds
            rows = interleaved(functions, rounds, _on_the_gpu if size == "gpu" else process_time)
            for label, function in functions.items():
                rows[label]["facts"] = self.facts(label, function, size)
        finally:
            torch.set_num_threads(threads)
        summary = {
            "name": self.name,
            "title": self.title,
            "size": size,
            "rounds": rounds,
            "timing": rows,
            "environment": environment(),
        }
        if isinstance(self.headline, str):
            return {**summary, "headline": self.headline.format(*(row["ratio"][0] for row in rows.values()))}
        return {**summary, "headline": self.headline(summary)}

    def write(self, size: str, folder: Path) -> dict[str, Any]:
        """Measure, and keep the summary in ``folder``."""
        summary = self.measure(size)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.stem(size)}.json").write_text(json.dumps(summary, indent=1) + "\n")
        return summary


def grid(summary: Mapping[str, Any]) -> list[list[str]]:
    """Header and rows for a table."""
    rows = summary["timing"]
    facts = list(dict.fromkeys(name for row in rows.values() for name in row.get("facts", {})))
    lines = [[summary["title"], "ms", "ratio", "95 %", *facts]]
    for label, row in rows.items():
        value, low, high = row["ratio"]
        mark = "" if row["significant"] or label == next(iter(rows)) else "~"
        own = [_shown(row.get("facts", {}).get(name)) for name in facts]
        lines.append([label, f"{1e3 * row['seconds']:.3g}", f"{mark}{value:.2f}", f"{low:.2f}-{high:.2f}", *own])
    return lines


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _on_the_gpu() -> float:
    torch.cuda.synchronize()
    return perf_counter()
