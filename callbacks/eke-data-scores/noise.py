"""Wrong labels: train without the samples that a model which has not seen them finds wrong, scoring charged.

python noise.py --size cpu --out ../../benchmarks/cpu-2core

Two small models, each trained on one half of the data, score the other half; those with the highest losses are left
out, as many as there are wrong labels. The controls: all samples; all samples for as long as scoring and training took
together; as many samples drawn at random. Every schedule ends with its run.
"""

import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from time import process_time

from eke_bench import Runs, main_of
from eke_bench.training import train, validate
from eke_bench.workloads import load
from eke_bench.workloads.vit import noisy
from eke_data_scores import Pruned, cross_scores
from torch.utils.data import DataLoader, TensorDataset

SHARES = (0.2, 0.4)
SCORING = 0.5  # steps of each scoring model, of those of a run
LABELS = {
    "all": "all samples",
    "longer": "all samples, steps of scoring added",
    "chosen": "lowest losses of a model that has not seen them",
    "random": "as many at random",
}


def run(size, share, seed):
    workload = load("vit", size)
    # The smallest model that has a depth: at size "smoke" that is the control.
    shape = workload.size.smaller if size == "smoke" else workload.size.shape
    clean = workload.data()[0]
    data = TensorDataset(clean.tensors[0], noisy(clean.tensors[1], share))
    wrong = clean.tensors[1] != data.tensors[1]
    steps = workload.size.steps

    def on(samples, steps, *callbacks):
        loader = DataLoader(samples, workload.size.batch, shuffle=True, drop_last=True)
        return train(workload, shape, workload.size.lrs[-1], steps, seed, callbacks=callbacks, loader=loader)

    def accuracy(steps, *callbacks):
        begun = process_time()
        model = on(data, steps, *callbacks)
        spent = process_time() - begun
        return {"accuracy": validate(model, workload)["val_accuracy"], "cpu_s": spent}

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "losses.npz"
        begun = process_time()
        scores = cross_scores(lambda half: on(half, round(SCORING * steps)), data, seed=seed)
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


def plan(size, seeds):
    runs = [(share, seed) for seed in range(seeds) for share in SHARES]
    return {f"{share} | {seed}": partial(run, size, share, seed) for share, seed in runs}


def tables(found, size):
    rows = [["wrong labels", "trained on", "accuracy, least to most", "CPU s, scoring in it"]]
    for share in sorted({name.split(" | ")[0] for name in found}):
        runs = [one for name, one in found.items() if name.split(" | ")[0] == share]
        for kind, label in LABELS.items():
            values = [one[kind]["accuracy"] for one in runs]
            extra = [one["scoring_cpu_s"] if kind == "chosen" else 0.0 for one in runs]
            spent = statistics.fmean(one[kind]["cpu_s"] + more for one, more in zip(runs, extra, strict=True))
            spread = f"{statistics.fmean(values):.3f}, {min(values):.3f} to {max(values):.3f}"
            rows.append([share, label, spread, f"{spent:.1f}"])
        hits = statistics.fmean(one["found"] for one in runs)
        rows.append([share, "of those left out, wrong labels", f"{hits:.2f}", ""])
    return [rows]


if __name__ == "__main__":
    sys.exit(main_of(Runs("pruning", "noise vit", plan, tables)))
