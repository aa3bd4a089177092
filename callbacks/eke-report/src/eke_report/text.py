"""The report in words."""

from __future__ import annotations

from typing import Any


def render(result: dict[str, Any]) -> str:
    """A report as lines of text, from what :class:`eke_report.Report` or :func:`eke_report.paired` found."""
    return _paired(result) if "pairs" in result else _run(result)


def _run(result: dict[str, Any]) -> str:
    processes = f", {result['processes']} processes" if result["processes"] > 1 else ""
    lines = [f"Effect report: {result['batches']} batches on {result['device']}, {result['precision']}{processes}"]
    if result["step_s"] is not None:
        lines.append(
            f"  step           {1e3 * result['step_s']:.1f} ms, {result['samples_per_s']:,.0f} samples a second"
        )
    if result["waiting_for_data"] is not None:
        lines.append(f"  data           {100 * result['waiting_for_data']:.1f} % of the time is waiting for batches")
    if result.get("utilization") is not None:
        ceiling = result["ceiling_flops_per_s"] / 1e9
        lines.append(
            f"  utilization    {100 * result['utilization']:.0f} % of the {ceiling:,.0f} GFLOP/s that this machine's "
            "best matrix product reaches"
        )
    if result["memory"]:
        causes = [f"{cause} {_bytes(size)}" for cause, size in result["memory"].items() if cause != "total" and size]
        lines.append(f"  peak memory    {_bytes(result['memory']['total'])}: {', '.join(causes)}")
    if not result["techniques"]:
        lines.append("  no technique of Eke was in this run")
    for name, effect in result["techniques"].items():
        lines.append(f"  {name:<14} {_effect(name, effect)}")
    if any("paired" in effect.get("why", "") for effect in result["techniques"].values()):
        lines.append("Paired runs: eke report pairs MODULE:BUILD TECHNIQUE ..., or eke_report.paired(build, recipe).")
    return "\n".join(lines)


def _effect(name: str, effect: dict[str, Any]) -> str:
    memory = f"; peak memory {effect['memory_ratio']:.2f}" if "memory_ratio" in effect else ""
    if not effect["measured"]:
        return f"not measured: {effect['why']}{memory}"
    ratio, low, high = effect["step_ratio"]
    copies = f" of copies of {effect['copies']} steps" if effect.get("copies") else ""
    spread = f"[{low:.2f}, {high:.2f}] in {effect['rounds']} rounds{copies}"
    control = f"A/A {effect['control'][1]:.2f} to {effect['control'][2]:.2f}"
    if effect["told_apart"]:
        said = f"a step takes {ratio:.2f} of its time without it {spread}; {control}"
    else:
        said = f"no measurable gain or loss of time: {ratio:.2f} {spread}; {control}"
    return said + memory


def _paired(result: dict[str, Any]) -> str:
    lines = [
        f"Paired runs: {result['steps']} steps, {result['seeds']} seeds, the same start and batches with and without",
        f"  {'':<14} {'time of a step':<26} {'peak memory':<12} loss after as many steps",
    ]
    for name, pair in result["pairs"].items():
        ratio, low, high = pair["step_ratio"]
        sign = "" if pair["told_apart"] else "~"
        memory = "-" if pair["memory_ratio"] is None else f"{pair['memory_ratio']:.2f}"
        lines.append(
            f"  {name:<14} {f'{sign}{ratio:.2f} [{low:.2f}, {high:.2f}]':<26} {memory:<12} "
            f"{pair['loss'][0]:.4f} against {pair['loss'][1]:.4f}"
        )
    low, high = result["control"]
    lines.append(f"A/A control {low:.2f} to {high:.2f}; what lies inside is marked ~. A loss after as many steps is no")
    lines.append("judgement of a technique that takes less time for them: for that, eke bench (eke-bench).")
    return "\n".join(lines)


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
