"""What is compared with what: one technique, its plain baseline at three budgets, and the controls it has to beat."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from eke import ArgumentError
from eke.spec import EkeError

from eke_bench.runner import Runner
from eke_bench.store import Run
from eke_bench.workloads import load

Recipe = Mapping[str, Mapping[str, Any]]
CLAIMS = ("changed algorithm", "same mathematics", "less memory")
AGAIN = 100  # added to the seeds of the A/A control


@dataclass(frozen=True)
class Benchmark:
    """One comparison; a technique's ``benchmark.py`` is this and a call of :func:`eke_bench.main`.

    Args:
        name: Of the technique, or of whatever is compared.
        variants: What is measured, by label. The first is the one that the headline is about.
        workload: Name, or ``package.module:Class``.
        claim: ``"changed algorithm"``: quality at equal cost, and cost at equal quality, are compared.
            ``"same mathematics"``: losses have to be equal, and cost of a step and memory are compared.
            ``"less memory"``: memory, and what it costs in quality and in time after as many steps, are compared.
        controls: Recipes that should do worse if the idea is right, such as a random choice in place of a computed one.
        shape: Of the model, where the reference model is not what the technique is for: ``"deep"``, or one for each
            size. The comparison is then labelled as one of a fixed architecture.
        smaller: Of the control, a plain model that costs less a step: one for each size, or ``"reference"``, the
            control of the reference model. By default half of the blocks of a deep model, else the reference's.
        prepare: Is told the size before the first run, to make what the runs need, such as a file of scores.
        folder: Where the runs look for files and ``prepare`` writes them: that of the script.
        subjects: Who else trains the same, by label: names of ``eke_bench.subjects``.
        baseline: Who trains the plain model that all are held against.
    """

    name: str
    variants: Mapping[str, Recipe]
    workload: str = "gpt"
    claim: Literal["changed algorithm", "same mathematics", "less memory"] = "changed algorithm"
    controls: Mapping[str, Recipe] = field(default_factory=dict)
    shape: Mapping[str, Mapping[str, int]] | Literal["deep"] = field(default_factory=dict)
    smaller: Mapping[str, Mapping[str, int]] | Literal["reference"] = field(default_factory=dict)
    prepare: Callable[[str], None] | None = None
    folder: str | Path = "."
    subjects: Mapping[str, str] = field(default_factory=dict)
    baseline: str = "lightning"

    def __post_init__(self) -> None:
        if not self.variants:
            raise ArgumentError(f"{self.name} compares nothing: variants is empty. Give one recipe or more, by label.")
        if self.claim not in CLAIMS:
            raise ArgumentError(f"claim={self.claim!r} is none of: {', '.join(CLAIMS)}.")

    def shapes(self, size: str) -> tuple[dict[str, int], dict[str, int]]:
        """Of the model and of the smaller control at a size.

        Raises:
            ValueError: a deep model is wanted, and the workload has none.
        """
        at = load(self.workload, size).size
        shape, smaller = at.shape, at.smaller
        if self.shape == "deep":
            if at.deep is None:
                raise ArgumentError(
                    f"{self.workload} has no deep model. Give shape={{{size!r}: {{...}}}} in its place."
                )
            shape, smaller = at.deep, {**at.deep, "blocks": at.deep["blocks"] // 2}
        else:
            shape = self.shape.get(size, shape)
        if self.smaller == "reference":
            smaller = at.smaller
        else:
            smaller = self.smaller.get(size, smaller)
        return dict(shape), dict(smaller)


def measure(benchmark: Benchmark, size: str, runner: Runner, seeds: int | None = None) -> dict[str, list[Any]]:
    """Train everything that the comparison needs, and return the results by label, one for each seed.

    The learning rate is tuned for the baseline, and for the smaller model, and every run's ends at its own budget.
    Labels: ``"baseline"``, ``"baseline, 1/2"``, ``"baseline, 1/3"``, ``"A/A"``, each variant, control and subject, and,
    for a changed algorithm, ``"plain, same cost"`` (for as many steps as come to the normalized cost of the first
    variant) and ``"smaller, same cost"``.
    """
    with working_in(benchmark.folder):
        if benchmark.prepare is not None and runner.train:
            benchmark.prepare(size)
        return _measure(benchmark, size, runner, seeds)


def _measure(benchmark: Benchmark, size: str, runner: Runner, seeds: int | None) -> dict[str, list[Any]]:
    at = load(benchmark.workload, size).size
    numbers = range(seeds or at.seeds)
    shape, smaller = benchmark.shapes(size)
    full = Run(benchmark.workload, size, shape, at.steps, 0.0, subject=benchmark.baseline)
    full = full.but(lr=tune(full, at.lrs, runner))
    plan: dict[str, list[Run]] = {"baseline": [full.but(seed=seed) for seed in numbers]}
    if benchmark.claim == "changed algorithm":
        for budget, label in ((1 / 2, "1/2"), (1 / 3, "1/3")):
            steps = whole(at.steps * budget, at.evaluations)
            plan[f"baseline, {label}"] = [full.but(seed=seed, steps=steps) for seed in numbers]
    if benchmark.claim == "same mathematics":
        plan["A/A"] = [full.but(seed=seed, again=1) for seed in numbers]
    else:
        plan["A/A"] = [full.but(seed=seed + AGAIN) for seed in numbers]
    for label, recipe in {**benchmark.variants, **benchmark.controls}.items():
        plan[label] = [full.but(seed=seed, subject="lightning", recipe=_plain(recipe)) for seed in numbers]
    for label, subject in benchmark.subjects.items():
        plan[label] = [full.but(seed=seed, subject=subject) for seed in numbers]
    results = run(plan, runner)
    if benchmark.claim == "changed algorithm":
        cost = normalized_cost(results[next(iter(benchmark.variants))])
        if cost is not None:
            results |= run(matched(full, full.but(shape=smaller), cost, at, numbers, results, runner), runner)
    return results


def run(plan: Mapping[str, list[Run]], runner: Runner) -> dict[str, list[Any]]:
    """Train a plan, seed by seed, so that a benchmark that is stopped has whole seeds."""
    by_seed = [one for runs in zip(*plan.values(), strict=True) for one in runs]
    done = dict(zip([one.id() for one in by_seed], runner(by_seed), strict=True))
    return {label: [done[one.id()] for one in runs] for label, runs in plan.items()}


def matched(
    full: Run, smaller: Run, cost: float, at: Any, numbers: range, results: Mapping[str, list[Any]], runner: Runner
) -> dict[str, list[Run]]:
    """The baseline, and a smaller model at its own learning rate, for as many steps as come to ``cost``."""
    per_step = normalized_cost(results["baseline"]) / at.steps
    plain = full.but(steps=whole(cost / per_step, at.evaluations))
    (pilot,) = runner([smaller.but(steps=whole(at.steps / 6, at.evaluations), lr=full.lr)])
    if pilot["status"] != "ok":
        raise EkeError(f"the smaller control model cannot be trained: {pilot['error']}")
    steps = whole(cost / (pilot["costs"]["normalized_cost"] / pilot["costs"]["steps"]), at.evaluations)
    smaller = smaller.but(steps=steps)
    smaller = smaller.but(lr=tune(smaller, at.lrs, runner))
    return {
        "plain, same cost": [plain.but(seed=seed) for seed in numbers],
        "smaller, same cost": [smaller.but(seed=seed) for seed in numbers],
    }


def tune(run: Run, rates: tuple[float, ...], runner: Runner) -> float:
    """The best learning rate of a sweep on seed 0, which goes on beyond an end as long as that is the best.

    Raises:
        EkeError: no learning rate trained.
    """
    tried: dict[float, float] = {}
    todo = list(rates)
    while todo:
        for rate, result in zip(todo, runner([run.but(lr=rate) for rate in todo]), strict=True):
            tried[rate] = quality(result) if result["status"] == "ok" else float("inf")
            if result["status"] != "ok" and len(tried) == len(rates) and min(tried.values()) == float("inf"):
                raise EkeError(f"the baseline cannot be trained at any learning rate: {result['error']}")
        best = min(tried, key=tried.get)
        todo = []
        if len(tried) < len(rates) + 4:
            todo = [2 * best] if best == max(tried) else [best / 2] if best == min(tried) else []
    return best


def quality(result: Mapping[str, Any]) -> float:
    """The deciding measure of a result, lower being better; a loss that is no number counts as infinite."""
    workload = load(result["run"]["workload"], result["run"]["size"])
    value = result["final"][workload.metric]
    if value != value:
        return float("inf")
    return -value if workload.higher_is_better else value


def normalized_cost(results: list[Mapping[str, Any]]) -> float | None:
    """Median cost in reference steps, of the runs of which it is known; None if it is known of none."""
    costs = [one["costs"]["normalized_cost"] for one in results if one["status"] == "ok"]
    known = [cost for cost in costs if cost is not None]
    return statistics.median(known) if known else None


def whole(steps: float, evaluations: int) -> int:
    """A number of steps that divides into the evaluations."""
    return max(1, round(steps / evaluations)) * evaluations


@contextmanager
def working_in(folder: str | Path) -> Iterator[None]:
    """Runs name their files without a folder, so that a result is found again wherever the checkout lies."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _plain(recipe: Recipe) -> dict[str, dict[str, Any]]:
    return {name: dict(arguments) for name, arguments in recipe.items()}
