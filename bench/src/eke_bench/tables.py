"""Results on the terminal and as Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from eke_bench import timing
from eke_bench.stats import counted

VERDICTS = ("steps", "quality", "step", "for the quality", "for the cost")
COSTS = ("peak MiB", "normalized cost", "CPU s", "wall s", "GFLOP", "energy J", "first step s")


def show(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a comparison: what each row gives, its costs, then what may be concluded."""
    console = console or Console()
    fixed = ", fixed architecture" if summary["fixed_architecture"] else ""
    seeds = counted(summary["seeds"], "seed")
    title = f"{summary['name']} on {summary['workload']}, size {summary['size']}, {seeds}{fixed}"
    console.print(title, style="bold", highlight=False)
    for columns in (VERDICTS, COSTS):
        head, *rows = grid(summary, columns)
        table = _table(head)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in notes(summary):
        console.print(line, highlight=False)


def show_timing(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what a :class:`eke_bench.Timing` found."""
    head, *rows = timing.grid(summary)
    table = _table(head)
    for row in rows:
        table.add_row(*row)
    (console or Console()).print(table)


def markdown(summary: Mapping[str, Any], columns: Sequence[str] = (*VERDICTS, *COSTS[:3])) -> str:
    """The table for a README."""
    return grid_markdown(timing.grid(summary) if "timing" in summary else grid(summary, columns))


def grid_markdown(grid: Sequence[Sequence[str]]) -> str:
    """Rows of text, header first."""
    head, *rows = grid
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def grid(summary: Mapping[str, Any], columns: Sequence[str]) -> list[list[str]]:
    """Header and rows of these columns, without those that are empty in every row."""
    rows = [[row["label"], *(_cell(column, row, summary) for column in columns)] for row in summary["rows"].values()]
    head = ["run", *(summary["unit"] if column == "quality" else column for column in columns)]
    kept = [number for number in range(len(head)) if any(row[number] not in ("", "-") for row in rows)]
    return [[line[number] for number in kept] for line in (head, *rows)]


def _cell(column: str, row: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """What is not known is a dash; what failed says so once."""
    if row["status"] != "ok":
        return row["status"] if column in ("steps", "normalized cost") else ""
    sign = -1 if summary["higher_is_better"] else 1
    values = [sign * value for value in row["quality"]]
    spread = f" ±{(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
    plain = row["role"] in ("baseline", "A/A")
    return {
        "steps": lambda: f"{row['steps']:,}",
        "quality": lambda: f"{statistics.fmean(values):.3f}{spread}",
        "step": lambda: _ratio(row),
        "for the quality": lambda: "-" if plain else _bound(row.get("cost_at_quality")),
        "for the cost": lambda: "-" if plain else _gain(row),
        "peak MiB": lambda: _number(row["memory"] and row["memory"]["total"] / 2**20, ".1f"),
        "normalized cost": lambda: _number(row["normalized_cost"], ",.0f"),
        "CPU s": lambda: _number(row["cpu_s"], ",.1f"),
        "wall s": lambda: _number(row["wall_s"], ",.1f"),
        "GFLOP": lambda: _number(row["flops"] and row["flops"] / 1e9, ",.3g" if (row["flops"] or 0) < 1e12 else ",.0f"),
        "energy J": lambda: _number(row["energy_j"], ",.0f"),
        "first step s": lambda: _number(row["first_step_s"], ".2f"),
    }[column]()


def notes(summary: Mapping[str, Any]) -> list[str]:
    """What a reader has to know beside the numbers."""
    aa = summary["aa"]
    low, high = aa["cost_ratio"] or (math.nan, math.nan)
    lines = [
        "step: cost of a step, plain = 1. for the quality: cost, that of the plain model which gets as far = 1; "
        f"< and > are bounds. for the cost: {summary['unit']} better (+) or worse (-) than the plain model for the "
        "same cost. normalized cost: in steps of the reference model, taken between the steps of the same run.",
        f"A/A control: cost of a step {low:.3f} to {high:.3f} times itself, {summary['unit']} apart by up to "
        f"{aa['quality_reach']:.4f}. ~ marks no significant difference.",
    ]
    models = {"plain model": "baseline", "smaller": "smaller, same cost"}
    for words, label in models.items():
        row = summary["rows"].get(label, {"status": "none"})
        if row["status"] == "ok":
            shape = ", ".join(f"{name} {value}" for name, value in row["shape"].items())
            lines.append(f"{words}: {shape}, learning rate {row['lr']:g}.")
    failed = [row for row in summary["rows"].values() if row["status"] != "ok"]
    lines += [f"{row['label']}: {row['status']}: {row['error']}" for row in failed]
    return [*lines, f"Verdict: {summary['verdict']}."]


def inventory(workloads: Mapping[str, Any], subjects: Mapping[str, str | None]) -> None:
    """Print the workloads and subjects there are."""
    console = Console()
    table = Table("workload", "what", "judged by", "sizes", box=SIMPLE_HEAD)
    for name, workload in workloads.items():
        what = (type(workload).__doc__ or "").split("\n")[0]
        table.add_row(name, what, f"{workload.metric} ({workload.unit})", ", ".join(workload.sizes))
    console.print(table)
    table = Table("subject", "here", box=SIMPLE_HEAD)
    for name, missing in subjects.items():
        table.add_row(name, "yes" if missing is None else f"no: {missing}")
    console.print(table)


def ceilings(found: Mapping[str, Any]) -> None:
    """Print what the machine can do at best."""
    table = _table(["", "best", "median"])
    for name, rate in found.items():
        unit = "GB/s" if name == "copy" else "GFLOP/s"
        table.add_row(name, *(f"{rate[which] / 1e9:,.1f} {unit}" for which in ("best", "median")))
    Console().print(table)


def _table(head: Sequence[str]) -> Table:
    """Labels on the left, whole, and figures on the right."""
    table = Table(*head, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, column in enumerate(table.columns):
        column.justify = "left" if number == 0 else "right"
        column.no_wrap = number == 0
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _ratio(row: Mapping[str, Any]) -> str:
    if row["role"] == "baseline":
        return "1" if row["label"] == "baseline" else "-"
    if "step_ratio" not in row:
        return "-"
    return f"{'' if row['step_significant'] else '~'}{row['step_ratio'][0]:.2f}"


def _bound(cost: list[float] | None) -> str:
    if cost is None:
        return "-"
    value, low, high = cost
    if low == high:
        return f"{value:.2f}"
    return f"< {value:.2f}" if low < value else f"> {value:.2f}"


def _gain(row: Mapping[str, Any]) -> str:
    if "gain_interval" not in row:
        return "-"
    return f"{'' if row['gain_significant'] else '~'}{row['gain_interval'][0]:+.3f}"
