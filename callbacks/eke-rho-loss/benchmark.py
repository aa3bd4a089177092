"""Measure selection under wrong labels: a Vision Transformer on images of which a fifth has a wrong class.

python benchmark.py --size cpu --out ../../benchmarks/cpu-2core
"""

import sys
from pathlib import Path

from eke_bench import Benchmark, main_of
from eke_bench.training import train
from eke_bench.workloads import load
from eke_rho_loss import cross_scores
from torch.utils.data import DataLoader

STEPS = {"smoke": 8, "cpu": 400, "gpu": 1500}
FILE = "irreducible.npz"  # beside this script


def score(size):
    """Write the losses that the runs below choose by, if they are not there. Their cost is not in the tables."""
    if Path(FILE).exists():
        return
    workload = load("vit-noisy", size)
    _, small = CHOSEN.shapes(size)

    def on(half):
        loader = DataLoader(half, workload.size.batch, shuffle=True, drop_last=True)
        return train(workload, small, workload.size.lrs[1], STEPS[size], 100, loader=loader)

    cross_scores(on, workload.data()[0]).save(FILE)


def rho(keep, file=FILE):
    return {"rho_loss": {"file": file, "keep": keep}}


def pruned(mode):
    return {"data_pruning": {"file": FILE, "keep": 0.8, "mode": mode}}


CHOSEN = Benchmark(
    "rho_loss",
    variants={
        "RHO-LOSS, half": rho(0.5),
        "RHO-LOSS, fifth": rho(0.2),
        "pruned to the lowest 0.8": pruned("easy"),
    },
    controls={
        "highest losses, half": rho(0.5, "zero"),
        "random half": {"importance_sampling": {"keep": 0.5, "threshold": 1e9}},
        "pruned to random 0.8": pruned("random"),
    },
    workload="vit-noisy",
    shape="deep",
    prepare=score,
    folder=Path(__file__).parent,
)

if __name__ == "__main__":
    sys.exit(main_of(CHOSEN))
