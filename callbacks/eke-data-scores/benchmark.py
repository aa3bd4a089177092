"""Measure data pruning: as many steps of a Vision Transformer on a part of the samples, by score and at random.

python benchmark.py --size cpu --out ../../benchmarks/cpu-2core
"""

import sys
from pathlib import Path

from eke_bench import Benchmark, main_of
from eke_bench.training import train
from eke_bench.workloads import load
from eke_bench.workloads.vit import digits
from eke_data_scores import Score
from torch.utils.data import DataLoader, TensorDataset

FILE = "el2n.npz"  # beside this script: three runs of 320 steps at size "cpu", a fifth of a training run each


def score(size):
    """Write the scores that the runs below choose by, if they are not there. Their cost is not in the tables."""
    if Path(FILE).exists():
        return
    workload = load("vit", size)
    data, epochs = workload.data()[0], 4 if size != "smoke" else 1
    for seed in range(100, 103):
        loader = DataLoader(data, workload.size.batch, shuffle=True)  # the last batch too: every sample
        args = workload, workload.size.deep, workload.size.lrs[1], epochs * len(loader), seed
        train(*args, callbacks=[Score(FILE)], loader=loader, max_epochs=epochs)


def training_set():
    """For ``eke scores el2n.npz --data benchmark:training_set --sheet sheet.png``."""
    images, classes, _, _ = digits()
    return TensorDataset(images, classes)


def pruned(keep, mode):
    return {"data_pruning": {"file": FILE, "keep": keep, "mode": mode}}


PRUNED = Benchmark(
    "data_scores",
    variants={
        "hardest half": pruned(0.5, "hard"),
        "easiest half": pruned(0.5, "easy"),
        "random half": pruned(0.5, "random"),
        "hardest 0.8": pruned(0.8, "hard"),
        "random 0.8": pruned(0.8, "random"),
    },
    workload="vit",
    shape="deep",
    prepare=score,
    folder=Path(__file__).parent,
)

if __name__ == "__main__":
    sys.exit(main_of(PRUNED))
