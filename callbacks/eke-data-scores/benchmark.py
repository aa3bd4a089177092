"""Measure data pruning: as many steps of a Vision Transformer on a part of the samples, by score and at random.

python benchmark.py --size cpu --out ../../benchmarks/cpu-2core
"""

from __future__ import annotations

import sys
from pathlib import Path

from eke_bench import Benchmark, main_of
from eke_bench.workloads import load
from eke_bench.workloads.vit import digits
from eke_data_scores import Score
from lightning.pytorch import Trainer, seed_everything
from torch.utils.data import TensorDataset

SHAPE = {"smoke": {"blocks": 2, "width": 32}, "cpu": {"blocks": 4, "width": 64}, "gpu": {"blocks": 6, "width": 192}}
FILE = "el2n.npz"  # beside this script: three runs of 320 steps at size "cpu", a fifth of a training run each


def score(size: str) -> None:
    """Write the scores that the runs below choose by, if they are not there. Their cost is not in the ledger."""
    if Path(FILE).exists():
        return
    workload = load("vit", size)
    for seed in range(3):
        seed_everything(100 + seed, verbose=False)
        epochs = 4 if size != "smoke" else 1
        model = workload.model(SHAPE[size], workload.size.lrs[1], epochs * len(workload.train_loader(seed)))
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        loader = workload.train_loader(seed)
        loader = type(loader)(loader.dataset, workload.size.batch, shuffle=True)  # the last batch too: every sample
        Trainer(max_epochs=epochs, callbacks=[Score(FILE)], enable_model_summary=False, **quiet).fit(model, loader)


def training_set() -> TensorDataset:
    """For ``eke scores el2n.npz --data benchmark:training_set --sheet sheet.png``."""
    images, classes, _, _ = digits()
    return TensorDataset(images, classes)


def pruned(keep: float, mode: str) -> dict[str, dict[str, object]]:
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
    shape=SHAPE,
    smaller={
        "smoke": {"blocks": 1, "width": 32},
        "cpu": {"blocks": 2, "width": 64},
        "gpu": {"blocks": 3, "width": 192},
    },
)

if __name__ == "__main__":
    if "--show" not in sys.argv:
        score(sys.argv[sys.argv.index("--size") + 1] if "--size" in sys.argv else "cpu")
    sys.exit(main_of(PRUNED))
