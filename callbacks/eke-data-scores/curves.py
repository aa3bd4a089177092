"""Accuracy against the share of the data that is kept, by score, at random, and for a shorter run.

python curves.py --size cpu --out ../../benchmarks/cpu-2core

A run on a share of the data has that share of the steps, as in Sorscher and others 2022. The control trains on all of
the data for as many steps. Every schedule ends with its run.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from benchmark import FILE, score, training_set
from eke_bench.workloads import load
from eke_data_scores import Pruned, Scores, embed, prototypes
from lightning.pytorch import Trainer, seed_everything

KEPT = (0.1, 0.2, 0.4, 0.6, 0.8)
SHAPE = {"smoke": {"blocks": 1, "width": 32}, "cpu": {"blocks": 2, "width": 64}, "gpu": {"blocks": 6, "width": 192}}
PROTOTYPES = "prototypes.npz"
CHOICES = {
    "all samples, shorter run": None,
    "random": (FILE, "random"),
    "hard by EL2N": (FILE, "hard"),
    "easy by EL2N": (FILE, "easy"),
    "hard by prototypes of pixels": (PROTOTYPES, "hard"),
    "easy by prototypes of pixels": (PROTOTYPES, "easy"),
}


def accuracy(size: str, choice: str, keep: float, seed: int) -> float:
    workload = load("vit", size)
    steps = max(1, round(keep * workload.size.steps))
    seed_everything(seed, verbose=False)
    model = workload.model(SHAPE[size], workload.size.lrs[-1], steps)
    chosen = CHOICES[choice]
    callbacks = [Pruned(chosen[0], keep, mode=chosen[1], seed=seed)] if chosen and keep < 1 else []
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(max_steps=steps, callbacks=callbacks, limit_val_batches=0, **quiet)
    trainer.fit(model, workload.train_loader(seed))
    return float(Trainer(**quiet).validate(model, workload.val_loader(), verbose=False)[0]["val_accuracy"])


def measure(size: str, seeds: int, out: Path) -> None:
    """Every run's accuracy is written as it comes; what is there already is not run again."""
    score(size)
    if not Path(PROTOTYPES).exists():
        data = training_set()
        vectors = embed(lambda batch: batch[0].flatten(1), data)
        Scores.of(data, "prototypes", prototypes(vectors, clusters=10)).save(PROTOTYPES)
    found = json.loads(out.read_text()) if out.exists() else {}
    runs = [(choice, keep, seed) for seed in range(seeds) for keep in KEPT for choice in CHOICES]
    for choice, keep, seed in [*runs, *(("all samples, shorter run", 1.0, seed) for seed in range(seeds))]:
        name = f"{choice} | {keep} | {seed}"
        if name not in found:
            found[name] = accuracy(size, choice, keep, seed)
            print(f"{name}: {found[name]:.3f}", flush=True)
            out.write_text(json.dumps(found, indent=1))


def table(found: dict[str, float]) -> dict[str, dict[float, list[float]]]:
    rows: dict[str, dict[float, list[float]]] = {choice: {} for choice in CHOICES}
    for name, value in found.items():
        choice, keep, _ = name.split(" | ")
        rows[choice].setdefault(float(keep), []).append(value)
    return rows


def show(found: dict[str, float], picture: Path) -> None:
    from matplotlib.figure import Figure

    rows = table(found)
    shares = sorted({keep for row in rows.values() for keep in row})
    print("| kept | " + " | ".join(f"{keep:g}" for keep in shares) + " |\n|" + " --- |" * (len(shares) + 1))
    figure = Figure(figsize=(7, 4.5), dpi=100, layout="constrained")
    axes = figure.subplots()
    for choice, row in rows.items():
        cells = [f"{statistics.fmean(row[keep]):.3f}" if keep in row else "" for keep in shares]
        print(f"| {choice} | " + " | ".join(cells) + " |")
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="cpu", choices=tuple(SHAPE))
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--show", action="store_true", help="print what is stored, and draw it")
    given = parser.parse_args()
    stored = given.out / f"pruning-curves-vit-{given.size}.json"
    if not given.show:
        measure(given.size, given.seeds, stored)
    show(json.loads(stored.read_text()), stored.with_suffix(".png"))
