"""From stored results to what may be said: rows of a table, each with its verdict."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from eke import ArgumentError

from eke_bench.benchmark import Benchmark, normalized_cost, quality
from eke_bench.stats import cost_of_quality, counted, paired_mean, quality_at_cost
from eke_bench.workloads import load

PLAIN = ("baseline", "baseline, 1/2", "baseline, 1/3", "plain, same cost")
TOLERANCE = 1e-4  # of a loss, relative, within which two runs of the same mathematics count as equal


def summarize(benchmark: Benchmark, size: str, results: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Everything that tables, pictures and headlines show, as plain data.

    Returns:
        ``rows``, one for each label, with medians over seeds; ``aa``, how far two rows of the same runs differ;
        ``verdict`` and ``headline`` for the first variant.
    """
    workload = load(benchmark.workload, size)
    rows = {label: _row(label, benchmark, runs) for label, runs in results.items()}
    baseline = rows["baseline"]
    if baseline["status"] != "ok":
        raise ArgumentError(f"the baseline of {benchmark.name} has no result: {baseline['error']}")
    aa = _noise(results)
    for label, row in rows.items():
        if row["status"] == "ok":
            _compare(row, results[label], results, aa)
    summary = {
        "name": benchmark.name,
        "workload": benchmark.workload,
        "size": size,
        "claim": benchmark.claim,
        "unit": workload.unit,
        "higher_is_better": workload.higher_is_better,
        "fixed_architecture": benchmark.shapes(size)[0] != dict(workload.size.shape),
        "seeds": len(results["baseline"]),
        "aa": aa,
        "rows": rows,
        "environment": next(one for one in results["baseline"] if one["status"] == "ok")["environment"],
    }
    first = rows[next(iter(benchmark.variants))]
    conclude = {"same mathematics": _same_verdict, "less memory": _memory_verdict}.get(
        benchmark.claim, _changed_verdict
    )
    summary["verdict"] = conclude(first, rows) if first["status"] == "ok" else f"failed: {first['error']}"
    summary["headline"] = _headline(summary, first)
    return summary


def _row(label: str, benchmark: Benchmark, runs: list[Any]) -> dict[str, Any]:
    good = [one for one in runs if one["status"] == "ok"]
    row: dict[str, Any] = {"label": label, "role": _role(label, benchmark), "runs": len(good)}
    if len(good) < len(runs):
        bad = next(one for one in runs if one["status"] != "ok")
        return {**row, "status": bad["status"], "error": bad["error"]}
    costs = [one["costs"] for one in good]
    memory = costs[0]["memory"]
    return {
        **row,
        "status": "ok",
        "steps": good[0]["run"]["steps"],
        "lr": good[0]["run"]["lr"],
        "shape": good[0]["run"]["shape"],
        "quality": [quality(one) for one in good],
        "final": {name: statistics.fmean(one["final"][name] for one in good) for name in good[0]["final"]},
        **{
            name: _middle(one[name] for one in costs)
            for name in ("wall_s", "cpu_s", "normalized_cost", "flops", "energy_j")
        },
        "memory": memory,
        "first_step_s": _middle(one["first_step_s"] for one in costs),
    }


def _role(label: str, benchmark: Benchmark) -> str:
    for role, labels in (
        ("variant", benchmark.variants),
        ("control", benchmark.controls),
        ("subject", benchmark.subjects),
    ):
        if label in labels:
            return role
    return {"A/A": "A/A", "plain, same cost": "control", "smaller, same cost": "control"}.get(label, "baseline")


def _noise(results: Mapping[str, list[Any]]) -> dict[str, Any]:
    """What differs between two rows of the same runs: cost of a step as a ratio, and quality, as the largest seen."""
    pairs = [
        (one, other)
        for one, other in zip(results["baseline"], results["A/A"], strict=True)
        if one["status"] == other["status"] == "ok"
    ]
    ratios = [_per_step(other) / _per_step(one) for one, other in pairs if _per_step(one) and _per_step(other)]
    gaps = [quality(other) - quality(one) for one, other in pairs]
    return {
        "cost_ratio": [min(ratios), max(ratios)] if ratios else None,
        "cost_reach": max((abs(math.log(ratio)) for ratio in ratios), default=0.0),
        "quality_gap": gaps,
        "quality_reach": max((abs(gap) for gap in gaps), default=0.0),
    }


def _compare(row: dict[str, Any], runs: list[Any], results: Mapping[str, list[Any]], aa: Mapping[str, Any]) -> None:
    """Add to a row how it stands against the baseline of the same seeds."""
    bases = results["baseline"]
    steps = [
        _per_step(one) / _per_step(base)
        for one, base in zip(runs, bases, strict=True)
        if base["status"] == "ok" and _per_step(one) and _per_step(base)
    ]
    if steps:
        row["step_ratio"] = [statistics.median(steps), min(steps), max(steps)]
        # A control of a few pairs may look quieter than the machine is: what is below two in a hundred never counts.
        row["step_significant"] = all(abs(math.log(ratio)) > max(aa["cost_reach"], 0.02) for ratio in steps)
    base_memory = bases[0]["costs"]["memory"] if bases[0]["status"] == "ok" else None
    if row["memory"] and base_memory:
        row["memory_ratio"] = row["memory"]["total"] / base_memory["total"]
    row["quality_gap"] = [
        quality(one) - quality(base) for one, base in zip(runs, bases, strict=True) if base["status"] == "ok"
    ]
    if "baseline, 1/2" not in results or row["normalized_cost"] is None:
        return
    costs, gains = [], []
    for number, run in enumerate(runs):
        mine = run["costs"]["normalized_cost"]
        if mine is None:  # too many of its steps were of a kind that was not timed
            continue
        points = [results[label][number] for label in PLAIN if label in results]
        curve = [(cost, quality(one)) for one in points if one["status"] == "ok" and (cost := normalized_cost([one]))]
        if not curve:
            continue
        needed = cost_of_quality(curve, quality(run))
        costs.append([mine / needed.value, mine / needed.high if needed.high else 0.0, _over(mine, needed.low)])
        reached = quality_at_cost(curve, mine)
        if reached is not None:
            gains.append(reached - quality(run))
    if costs:
        row["cost_at_quality"] = _middle_bound(costs)
    if gains:
        row["gain_at_cost"] = gains
        interval = paired_mean(gains)
        row["gain_interval"] = [interval.value, interval.low, interval.high]
        row["gain_significant"] = 0.0 not in interval and abs(interval.value) > aa["quality_reach"]


def _over(mine: float, low: float) -> float:
    return mine / low if low else math.inf


def _middle_bound(costs: list[list[float]]) -> list[float]:
    """The run in the middle by its ratio, with how far the truth may be from it: [ratio, at least, at most]."""
    return sorted(costs)[len(costs) // 2]


def _changed_verdict(row: Mapping[str, Any], rows: Mapping[str, Any]) -> str:
    """One of: pays; a smaller model pays more; no significant difference; does not pay; not comparable."""
    if row["normalized_cost"] is None:
        return "not comparable: too few of its steps of each kind were timed to know its cost"
    if "gain_interval" not in row:
        return "not comparable: its cost lies beyond the baseline's three budgets"
    if not row["gain_significant"]:
        return "no significant difference at equal compute"
    if row["gain_interval"][0] < 0:
        return "does not pay: the plain model is better for the same cost"
    smaller = rows.get("smaller, same cost")
    if smaller and smaller["status"] == "ok":
        gaps = paired_mean([s - q for s, q in zip(smaller["quality"], row["quality"], strict=True)])
        if gaps.value < 0:
            return "pays where the architecture is given; a smaller plain model is better for the same cost"
    return "pays"


def _memory_verdict(row: Mapping[str, Any], rows: Mapping[str, Any]) -> str:
    """Memory, and what it costs."""
    gaps = paired_mean(row["quality_gap"])
    noise = max(abs(a - b) for a, b in zip(rows["A/A"]["quality"], rows["baseline"]["quality"], strict=True))
    takes, same, said = [], [], []
    if "memory_ratio" in row:
        takes.append(f"{row['memory_ratio']:.2f} of the peak memory")
    else:
        said.append("memory not known")
    if row.get("step_significant"):
        takes.append(f"{row['step_ratio'][0]:.2f} of its time")
    else:
        same.append("time")
    if 0.0 in gaps or abs(gaps.value) <= noise:
        same.append("quality")
    else:
        said.append(f"quality {'worse' if gaps.value > 0 else 'better'} by {abs(gaps.value):.3f}")
    if takes:
        said.insert(0, f"a step takes {' and '.join(takes)}")
    if same:
        said.append(f"no significant difference in {' or '.join(same)}")
    return "; ".join(said)


def _same_verdict(row: Mapping[str, Any], rows: Mapping[str, Any]) -> str:
    """Whether the mathematics is the same, and what a step costs."""
    base = rows["baseline"]["quality"]
    off = max(abs(gap) / max(abs(value), 1e-12) for gap, value in zip(row["quality_gap"], base, strict=True))
    if off <= TOLERANCE:
        said = "same losses"
    elif (
        len(base) > 1 and 0.0 in paired_mean(row["quality_gap"]) and _reach(row["quality_gap"]) < max(base) - min(base)
    ):
        said = f"losses apart by up to {_reach(row['quality_gap']):.1g}, as rounding grows; no significant difference"
    else:
        said = f"not the same mathematics here: losses differ by up to {off:.1e}"
    if "step_ratio" not in row:
        return f"{said}; cost of a step not known"
    if not row["step_significant"]:
        return f"{said}; no significant difference in the cost of a step"
    return f"{said}; a step costs {row['step_ratio'][0]:.2f} of the plain one"


def _reach(gaps: list[float]) -> float:
    return max(map(abs, gaps))


def _headline(summary: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """What the table of techniques says."""
    if row["status"] != "ok":
        return f"{row['status']}: {row['error']}"
    unit, rows = summary["unit"], summary["rows"]
    sign = -1 if summary["higher_is_better"] else 1
    value = sign * statistics.fmean(row["quality"])
    parts = []
    if "memory_ratio" in row:
        parts.append(f"{row['memory_ratio']:.2f} of the peak memory")
    if "step_ratio" in row:
        parts.append(f"{row['step_ratio'][0]:.2f} of the cost of a step")
    if summary["claim"] != "changed algorithm":
        return f"{summary['verdict']} ({summary['workload']}, {counted(summary['seeds'], 'seed')})"
    text = f"{summary['verdict']} ({summary['workload']}, {counted(summary['seeds'], 'seed')}): {value:.3f} {unit}"
    for label, words in (
        ("plain, same cost", "the plain model for the same cost"),
        ("smaller, same cost", "a smaller one"),
    ):
        if label in rows and rows[label]["status"] == "ok":
            text += f", {words} {sign * statistics.fmean(rows[label]['quality']):.3f}"
    return f"{text}; {', '.join(parts)}" if parts else text


def _per_step(result: Mapping[str, Any]) -> float | None:
    costs = result["costs"] if result["status"] == "ok" else {}
    return costs["normalized_cost"] / costs["steps"] if costs.get("normalized_cost") else None


def _middle(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
