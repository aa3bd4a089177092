"""Pictures of stored comparisons."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from eke_bench.analysis import PLAIN
from eke_bench.stats import counted, performance_profile

MARKS = {"variant": "o", "control": "s", "subject": "^", "A/A": "x"}


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """The picture that fits the claim: cost against quality, or ratios of cost and memory; a ladder's steps too."""
    if any(" + " in label for label in summary["rows"]):
        ladder(summary, path.with_name(f"{path.stem}-ladder.png"))
    if summary["claim"] != "changed algorithm":
        bars(summary, path)
    else:
        pareto(summary, path)


def pareto(summary: Mapping[str, Any], path: Path) -> None:
    """Cost against quality, the baseline's budgets as a line; what is no better than it is shaded."""
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    sign = -1 if summary["higher_is_better"] else 1
    rows = {label: row for label, row in summary["rows"].items() if row["status"] == "ok" and row["normalized_cost"]}
    plain = sorted((rows[label] for label in PLAIN if label in rows), key=lambda row: row["normalized_cost"])
    if plain:
        costs = [row["normalized_cost"] for row in plain]
        values = [sign * statistics.fmean(row["quality"]) for row in plain]
        axes.plot(costs, values, color="0.3", marker=".", label="plain model", zorder=2)
        worst = max if sign > 0 else min
        edge = worst(sign * value for row in rows.values() for value in row["quality"])
        axes.fill_between(costs, values, edge, color="0.92", zorder=0)
    for label, row in rows.items():
        if label in PLAIN:
            continue
        values = [sign * value for value in row["quality"]]
        middle = statistics.fmean(values)
        reach = [[middle - min(values)], [max(values) - middle]]
        axes.errorbar(row["normalized_cost"], middle, reach, fmt=MARKS[row["role"]], capsize=3, label=label, zorder=3)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("cost, steps of the reference model")
    axes.set_ylabel(summary["unit"])
    fixed = ", fixed architecture" if summary["fixed_architecture"] else ""
    axes.set_title(f"{summary['name']} on {summary['workload']}, {counted(summary['seeds'], 'seed')}{fixed}")
    axes.legend(fontsize="small")
    _save(figure, path)


def ladder(summary: Mapping[str, Any], path: Path) -> None:
    """A recipe built up one technique at a time, and without each: quality and cost of every step of it."""
    rows = [row for row in summary["rows"].values() if row["status"] == "ok" and row["role"] == "variant"]
    whole, *others = rows
    steps = [row for row in others if not row["label"].startswith("without ")]
    left_out = [row for row in others if row["label"].startswith("without ")]
    rows = [summary["rows"]["baseline"], *steps, whole, *left_out]
    sign = -1 if summary["higher_is_better"] else 1
    places = range(len(rows))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 1 + 0.5 * len(rows)), sharey=True, layout="constrained")
    for place, row in zip(places, rows, strict=True):
        values = [sign * value for value in row["quality"]]
        left.plot([min(values), max(values)], [place, place], color="0.6", zorder=1)
        color = "0.3" if row["role"] == "baseline" else "C1" if row in left_out else "C0"
        left.plot(statistics.fmean(values), place, "o", color=color, zorder=2)
    left.set_yticks(list(places), [row["label"] for row in rows])
    left.invert_yaxis()
    left.set_xlabel(summary["unit"])
    left.grid(axis="x", color="0.9")
    right.barh(list(places), [row["normalized_cost"] or 0 for row in rows], 0.6, color="0.6")
    right.set_xlabel("cost, steps of the reference model")
    figure.suptitle(f"{summary['workload']}, {counted(summary['seeds'], 'seed')}: one technique more at each step")
    _save(figure, path)


def bars(summary: Mapping[str, Any], path: Path) -> None:
    """Cost of a step and peak memory of each row, the baseline being 1."""
    rows = [row for row in summary["rows"].values() if row["status"] == "ok" and "step_ratio" in row]
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.6 * len(rows)), layout="constrained")
    places = range(len(rows))
    ratios = [row["step_ratio"] for row in rows]
    reach = [[middle - low for middle, low, _ in ratios], [high - middle for middle, _, high in ratios]]
    axes.barh([p - 0.2 for p in places], [r[0] for r in ratios], 0.38, xerr=reach, capsize=3, label="cost of a step")
    axes.barh([p + 0.2 for p in places], [row.get("memory_ratio", math.nan) for row in rows], 0.38, label="peak memory")
    axes.set_yticks(list(places), [row["label"] for row in rows])
    axes.invert_yaxis()
    axes.axvline(1, color="0.3", linewidth=1)
    axes.set_xlabel("times the baseline")
    axes.set_title(f"{summary['name']} on {summary['workload']}, {counted(summary['seeds'], 'seed')}")
    axes.legend(fontsize="small")
    _save(figure, path)


def profile(summaries: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Over the workloads of several comparisons: how often each is within a factor of the cheapest way to its quality.

    The cost of a method on a workload is what it took relative to what the baseline needs for the same quality.
    """
    costs: dict[str, dict[str, float]] = {"plain": {}}
    for summary in summaries:
        for label, row in summary["rows"].items():
            if row["status"] == "ok" and row["role"] == "variant" and "cost_at_quality" in row:
                costs["plain"][summary["workload"]] = 1.0
                costs.setdefault(f"{summary['name']}: {label}", {})[summary["workload"]] = row["cost_at_quality"][0]
    taus = [1 + 0.02 * step for step in range(151)]
    figure, axes = pyplot.subplots(figsize=(11, max(5, 0.2 * len(costs))), layout="constrained")
    for method, shares in performance_profile(costs, taus).items():
        area = statistics.fmean(shares)
        axes.step(taus, shares, where="post", label=f"{method} ({area:.2f})")
    axes.set_xlabel("factor of the cheapest")
    axes.set_ylabel("share of workloads")
    axes.set_ylim(-0.02, 1.02)
    axes.set_title("Performance profile; mean height in brackets")
    figure.legend(loc="outside right upper", fontsize="x-small")  # beside the curves: there may be many
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
