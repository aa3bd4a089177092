"""A workload's model in a plain Trainer, for scripts that need a trained model and not a comparison."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from eke.seams.state import seed_everything
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from eke_bench.workloads import Workload

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def train(
    workload: Workload,
    shape: Mapping[str, int],
    lr: float,
    steps: int,
    seed: int = 0,
    *,
    callbacks: Sequence[Callback] = (),
    loader: DataLoader | None = None,
    **trainer: Any,
) -> LightningModule:
    """Train a new model of the workload for ``steps``, without evaluation.

    Args:
        workload: Gives the model, and the data where no ``loader`` is given.
        shape: Of the model.
        lr: Highest learning rate.
        steps: Optimizer steps; the learning rate is zero after the last.
        seed: Of initial weights and data order.
        callbacks: Techniques among them.
        loader: Other data than the workload's.
        trainer: Further arguments of the Trainer.
    """
    seed_everything(seed)
    model = workload.model(shape, lr, steps)
    with quiet():
        made = Trainer(max_steps=steps, callbacks=list(callbacks), limit_val_batches=0, devices=1, **QUIET, **trainer)
        made.fit(model, workload.train_loader(seed) if loader is None else loader)
    return model


def validate(model: LightningModule, workload: Workload, **trainer: Any) -> dict[str, float]:
    """The workload's held-out measures of a model."""
    with quiet():
        (found,) = Trainer(devices=1, **QUIET, **trainer).validate(model, workload.val_loader(), verbose=False)
    return {name: float(value) for name, value in found.items()}


@contextmanager
def quiet() -> Iterator[None]:
    """Without what Lightning says about every Trainer; a benchmark makes hundreds."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated.*")
            yield
    finally:
        logger.setLevel(level)
