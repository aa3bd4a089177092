"""Results on the terminal and as Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

COLUMNS = (
    "run",
    "steps",
    "quality",
    "ledger",
    "CPU s",
    "wall s",
    "PFLOP",
    "peak MiB",
    "energy J",
    "step",
    "cost at equal quality",
    "gain at equal cost",
)


def show(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a comparison: every row with its five accounts, then what may be concluded."""
    console = console or Console()
    fixed = ", fixed architecture" if summary["fixed_architecture"] else ""
    title = f"{summary['name']}: {summary['workload']}, size {summary['size']}, {summary['seeds']} seeds{fixed}"
    table = Table(*(cell.replace("quality", summary["unit"], 1) if cell == "quality" else cell for cell in COLUMNS))
    table.title, table.box, table.title_justify = title, SIMPLE_HEAD, "left"
    for number, column in enumerate(table.columns):
        column.justify = "left" if number == 0 else "right"
        column.overflow = "fold"
    for row in summary["rows"].values():
        table.add_row(*cells(row, summary))
    console.print(table)
    for line in notes(summary):
        console.print(line, highlight=False)


def markdown(summary: Mapping[str, Any]) -> str:
    """The same table for a README, without columns that are empty in every row."""
    rows = [cells(row, summary) for row in summary["rows"].values()]
    kept = [number for number in range(len(COLUMNS)) if any(row[number] not in ("", "-") for row in rows)]
    names = [summary["unit"] if COLUMNS[number] == "quality" else COLUMNS[number] for number in kept]
    lines = [names, ["---"] * len(kept), *([row[number] for number in kept] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(row: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    """A row of the table; what is not known is a dash, what failed says so."""
    if row["status"] != "ok":
        return [row["label"], row["status"], *[""] * (len(COLUMNS) - 2)]
    sign = -1 if summary["higher_is_better"] else 1
    values = [sign * value for value in row["quality"]]
    spread = f" ±{(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
    return [
        row["label"],
        f"{row['steps']:,}",
        f"{statistics.fmean(values):.3f}{spread}",
        _number(row["ledger"], ",.0f"),
        _number(row["cpu_s"], ".1f"),
        _number(row["wall_s"], ".1f"),
        _number(row["flops"] and row["flops"] / 1e15, ".3g"),
        _number(row["memory"] and row["memory"]["total"] / 2**20, ".1f"),
        _number(row["energy_j"], ",.0f"),
        _ratio(row.get("step_ratio"), row.get("step_told_apart"), row),
        _bound(row.get("cost_at_quality"), row),
        _gain(row),
    ]


def notes(summary: Mapping[str, Any]) -> list[str]:
    """What a reader has to know beside the numbers."""
    aa = summary["aa"]
    low, high = aa["cost_ratio"] or (math.nan, math.nan)
    lines = [
        f"A/A control: cost of a step {low:.3f} to {high:.3f} times itself, {summary['unit']} apart by up to "
        f"{aa['quality_reach']:.4f}. What lies inside is marked ~: not told apart.",
        "ledger: cost in steps of the reference model, measured between the steps of the same run.",
    ]
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
    console = Console()
    for name, value in found.items():
        console.print(f"{name}: {value}", highlight=False)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _ratio(ratio: list[float] | None, apart: bool | None, row: Mapping[str, Any]) -> str:
    if ratio is None or row["label"] == "baseline":
        return "-" if ratio is None else "1"
    return f"{'' if apart else '~'}{ratio[0]:.2f}"


def _bound(cost: list[float] | None, row: Mapping[str, Any]) -> str:
    if cost is None or row["role"] in ("baseline", "A/A"):
        return "-"
    value, low, high = cost
    if low == high:
        return f"{value:.2f}"
    return f"< {value:.2f}" if low < value else f"> {value:.2f}"


def _gain(row: Mapping[str, Any]) -> str:
    if "gain_interval" not in row or row["role"] in ("baseline", "A/A"):
        return "-"
    return f"{'' if row['gain_told_apart'] else '~'}{row['gain_interval'][0]:+.3f}"
