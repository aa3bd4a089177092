"""Measure selection under wrong labels: a Vision Transformer on images of which a fifth has a wrong class.

python benchmark.py --size cpu --out ../../benchmarks/cpu-2core
"""

from __future__ import annotations

import sys
from pathlib import Path

from eke_bench import Benchmark, main_of
from eke_bench.workloads import load
from eke_rho_loss import cross_scores
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, Subset

SHAPE = {"smoke": {"blocks": 2, "width": 32}, "cpu": {"blocks": 4, "width": 64}, "gpu": {"blocks": 6, "width": 192}}
SMALL = {"smoke": {"blocks": 1, "width": 32}, "cpu": {"blocks": 2, "width": 64}, "gpu": {"blocks": 3, "width": 192}}
STEPS = {"smoke": 8, "cpu": 400, "gpu": 1500}
FILE = "irreducible.npz"


def score(size: str) -> None:
    """Write the losses that the runs below choose by, if they are not there. Their cost is not in the ledger."""
    if Path(FILE).exists():
        return
    workload = load("vit-noisy", size)

    def train(half: Subset) -> LightningModule:
        seed_everything(100, verbose=False)
        model = workload.model(SMALL[size], workload.size.lrs[1], STEPS[size])
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(max_steps=STEPS[size], enable_model_summary=False, **quiet)
        trainer.fit(model, DataLoader(half, workload.size.batch, shuffle=True, drop_last=True))
        return model

    cross_scores(train, workload.train_loader(0).dataset).save(FILE)


def rho(keep: float, file: str = FILE) -> dict[str, dict[str, object]]:
    return {"rho_loss": {"file": file, "keep": keep}}


def pruned(mode: str) -> dict[str, dict[str, object]]:
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
    shape=SHAPE,
    smaller=SMALL,
)

if __name__ == "__main__":
    if "--show" not in sys.argv:
        score(sys.argv[sys.argv.index("--size") + 1] if "--size" in sys.argv else "cpu")
    sys.exit(main_of(CHOSEN))
