"""Accuracy against the share of the data that is kept, by score, at random, and for a shorter run.

python curves.py --size cpu --out ../../benchmarks/cpu-2core

A run on a share of the data has that share of the steps, as in Sorscher and others 2022. The control trains on all of
the data for as many steps. Every schedule ends with its run.
"""

import statistics
import sys
from functools import partial
from pathlib import Path

from benchmark import FILE, score, training_set
from eke_bench import Runs, main_of
from eke_bench.training import train, validate
from eke_bench.workloads import load
from eke_data_scores import Pruned, Scores, embed, prototypes

KEPT = (0.1, 0.2, 0.4, 0.6, 0.8)
PROTOTYPES = "prototypes.npz"
ALL = "all samples, shorter run"
CHOICES = {
    ALL: None,
    "random": (FILE, "random"),
    "hard by EL2N": (FILE, "hard"),
    "easy by EL2N": (FILE, "easy"),
    "hard by prototypes of pixels": (PROTOTYPES, "hard"),
    "easy by prototypes of pixels": (PROTOTYPES, "easy"),
}


def accuracy(size, choice, keep, seed):
    scores(size)
    workload, chosen = load("vit", size), CHOICES[choice]
    pruned = [Pruned(chosen[0], keep, mode=chosen[1], seed=seed)] if chosen and keep < 1 else []
    steps = max(1, round(keep * workload.size.steps))
    # The smallest model that has a depth: at size "smoke" that is the control.
    shape = workload.size.smaller if size == "smoke" else workload.size.shape
    model = train(workload, shape, workload.size.lrs[-1], steps, seed, callbacks=pruned)
    return validate(model, workload)["val_accuracy"]


def scores(size):
    """Write the files of scores that are not there."""
    score(size)
    if not Path(PROTOTYPES).exists():
        data = training_set()
        vectors = embed(lambda batch: batch[0].flatten(1), data)
        Scores.of(data, "prototypes", prototypes(vectors, clusters=10)).save(PROTOTYPES)


def plan(size, seeds):
    runs = [(choice, keep, seed) for seed in range(seeds) for keep in KEPT for choice in CHOICES]
    runs += [(ALL, 1.0, seed) for seed in range(seeds)]
    return {" | ".join(map(str, run)): partial(accuracy, size, *run) for run in runs}


def by_choice(found):
    """Choice to share to accuracies."""
    rows = {choice: {} for choice in CHOICES}
    for name, value in found.items():
        choice, keep, _ = name.split(" | ")
        rows[choice].setdefault(float(keep), []).append(value)
    return rows


def tables(found, size):
    rows = by_choice(found)
    shares = sorted({keep for row in rows.values() for keep in row})
    lines = [["kept", *(f"{keep:g}" for keep in shares)]]
    for choice, row in rows.items():
        lines.append([choice, *(f"{statistics.fmean(row[keep]):.3f}" if keep in row else "" for keep in shares)])
    return [lines]


def draw(found, picture):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=100, layout="constrained")
    axes = figure.subplots()
    for choice, row in by_choice(found).items():
        xs = sorted(row)
        means = [statistics.fmean(row[x]) for x in xs]
        spread = [[m - min(row[x]) for m, x in zip(means, xs, strict=True)],
                  [max(row[x]) - m for m, x in zip(means, xs, strict=True)]]  # fmt: skip
        axes.errorbar(xs, means, yerr=spread, marker="o", markersize=4, capsize=2, linewidth=1.3, label=choice)
    axes.set_xlabel("share of the data, and of the steps")
    axes.set_ylabel("accuracy on held-out digits")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(picture)


CURVES = Runs("pruning", "curves vit", plan, tables, draw=draw, folder=Path(__file__).parent)

if __name__ == "__main__":
    sys.exit(main_of(CURVES))
