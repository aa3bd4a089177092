"""Wrong labels: train without the samples that a model which has not seen them finds wrong, scoring charged.

python noise.py --size cpu --out ../../benchmarks/cpu-2core

Two small models, each trained on one half of the data, score the other half; those with the highest losses are left
out, as many as there are wrong labels. The controls: all samples; all samples for as long as scoring and training took
together; as many samples drawn at random. Every schedule ends with its run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from time import process_time

import torch
from eke_bench.workloads import load
from eke_bench.workloads.vit import noisy
from eke_data_scores import Pruned, Scores, cross_scores
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset

SHARES = (0.2, 0.4)
SHAPE = {"smoke": {"blocks": 1, "width": 32}, "cpu": {"blocks": 2, "width": 64}, "gpu": {"blocks": 6, "width": 192}}
SCORING = 0.5  # steps of each scoring model, of those of a run
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
LABELS = {
    "all": "all samples",
    "longer": "all samples, steps of scoring added",
    "chosen": "lowest losses of a model that has not seen them",
    "random": "as many at random",
}


def run(size: str, share: float, seed: int) -> dict[str, object]:
    workload = load("vit", size)
    clean = workload.train_loader(seed).dataset
    data = TensorDataset(clean.tensors[0], noisy(clean.tensors[1], share))
    wrong = clean.tensors[1] != data.tensors[1]
    steps = workload.size.steps

    def train(dataset: object, steps: int, callbacks: list[Pruned]) -> LightningModule:
        seed_everything(seed, verbose=False)
        model = workload.model(SHAPE[size], workload.size.lrs[-1], steps)
        loader = DataLoader(dataset, workload.size.batch, shuffle=True, drop_last=True)
        Trainer(max_steps=steps, callbacks=callbacks, limit_val_batches=0, **QUIET).fit(model, loader)
        return model

    def accuracy(steps: int, *callbacks: Pruned) -> dict[str, float]:
        begun = process_time()
        model = train(data, steps, list(callbacks))
        spent = process_time() - begun
        found = Trainer(**QUIET).validate(model, workload.val_loader(), verbose=False)[0]["val_accuracy"]
        return {"accuracy": float(found), "cpu_s": spent}

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "losses.npz"
        begun = process_time()
        scores: Scores = cross_scores(lambda half: train(half, round(SCORING * steps), []), data, seed=seed)
        scoring = process_time() - begun
        scores.save(file)
        highest = scores.values.argsort(descending=True)[: int(wrong.sum())]
        keep = 1 - float(wrong.float().mean())
        return {
            "scoring_cpu_s": scoring,
            "wrong": float(wrong.float().mean()),
            "found": float(wrong[highest].float().mean()),
            "all": accuracy(steps),
            "longer": accuracy(round((1 + 2 * SCORING) * steps)),
            "chosen": accuracy(steps, Pruned(file, keep, mode="easy")),
            "random": accuracy(steps, Pruned(file, keep, mode="random", seed=seed)),
        }


def show(stored: dict[str, dict]) -> None:
    print("| wrong labels | trained on | accuracy, least to most | CPU s, scoring in it |\n| --- | --- | --- | --- |")
    for share in sorted({name.split(" | ")[0] for name in stored}):
        runs = [one for name, one in stored.items() if name.split(" | ")[0] == share]
        for kind, label in LABELS.items():
            values = [one[kind]["accuracy"] for one in runs]
            extra = [one["scoring_cpu_s"] if kind == "chosen" else 0.0 for one in runs]
            spent = statistics.fmean(one[kind]["cpu_s"] + more for one, more in zip(runs, extra, strict=True))
            spread = f"{statistics.fmean(values):.3f}, {min(values):.3f} to {max(values):.3f}"
            print(f"| {share} | {label} | {spread} | {spent:.1f} |")
        print(f"| {share} | of those left out, wrong labels | {statistics.fmean(one['found'] for one in runs):.2f} | |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="cpu", choices=tuple(SHAPE))
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--show", action="store_true", help="print what is stored")
    given = parser.parse_args()
    file = given.out / f"pruning-noise-vit-{given.size}.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    for seed in range(0 if given.show else given.seeds):
        for share in SHARES:
            if f"{share} | {seed}" not in found:
                found[f"{share} | {seed}"] = {**run(given.size, share, seed), "torch": torch.__version__}
                file.write_text(json.dumps(found, indent=1))
    show(found)
