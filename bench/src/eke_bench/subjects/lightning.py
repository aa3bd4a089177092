"""The Trainer itself, with the techniques of a recipe in it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import eke
from eke.seams.state import seed_everything
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from eke_bench.meter import Meter
from eke_bench.store import Run
from eke_bench.training import QUIET
from eke_bench.workloads import Workload


class Lightning:
    def fit(self, run: Run, workload: Workload, meter: Meter) -> dict[str, float]:
        seed_everything(run.seed)
        model = workload.model(run.shape, run.lr, run.steps)
        techniques = eke.trainer_kwargs(**run.recipe)
        callbacks = [Metered(meter), *techniques.pop("callbacks", [])]
        trainer = Trainer(
            max_steps=run.steps,
            val_check_interval=max(1, run.steps // workload.size.evaluations),
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            gradient_clip_val=1.0,
            accelerator="gpu" if run.size == "gpu" else "cpu",
            precision=techniques.pop("precision", "bf16-mixed" if run.size == "gpu" else "32-true"),
            devices=1,
            callbacks=callbacks,
            **QUIET,
            **techniques,
        )
        trainer.fit(model, workload.train_loader(run.seed), workload.val_loader())
        # Where the number of steps divides into evaluations there has been one after the last step; and techniques
        # that keep other weights for evaluation have put them in.
        measures = trainer.validate(model, workload.val_loader(), verbose=False)[0]
        final = {name: float(value) for name, value in measures.items()}
        return {**final, **workload.finish(model)}


class Metered(Callback):
    """Tells the meter what the Trainer does."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self._kind = ""
        self._counting = ExitStack()
        self._tell: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.meter.start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.meter.wants_count():
            self._tell = self._counting.enter_context(self.meter.counting(pl_module, *trainer.optimizers))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        kinds = [one.step_kind() for one in eke.techniques(trainer)]
        kind = ", ".join([*filter(None, kinds), shapes(batch)])
        if self._tell is None:
            self.meter.step(kind)
        else:
            self._tell(kind)
            self._tell = None
            self._counting.close()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.training or trainer.state.fn == "fit":
            self.meter.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.meter.evaluated(**{name: float(value) for name, value in trainer.callback_metrics.items()})
            self.meter.resume()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.meter.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._counting.close()


def shapes(batch: Any) -> str:
    """The shapes of a batch's tensors: a step of other shapes is one of another kind."""
    if isinstance(batch, Tensor):
        return "x".join(map(str, batch.shape))
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return " ".join(filter(None, map(shapes, parts)))
