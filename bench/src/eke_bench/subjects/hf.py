"""Hugging Face's Trainer on the workload's own model, optimizer, schedule and data order."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from eke.spec import EkeError
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from eke_bench.meter import Meter
from eke_bench.store import Run
from eke_bench.subjects.hand import evaluate
from eke_bench.subjects.lightning import shapes
from eke_bench.workloads import Learner, Workload


class HuggingFace:
    def fit(self, run: Run, workload: Workload, meter: Meter) -> dict[str, float]:
        if run.recipe:
            raise EkeError(f"Hugging Face's Trainer takes no Eke techniques; it was given {', '.join(run.recipe)}.")
        set_seed(run.seed)
        model = workload.model(run.shape, run.lr, run.steps)
        configured = model.configure_optimizers()
        every = max(1, run.steps // workload.size.evaluations)
        watch = _Metered(meter, workload, every)
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                max_steps=run.steps,
                per_device_train_batch_size=workload.size.batch,
                max_grad_norm=1.0,
                bf16=run.size == "gpu",
                use_cpu=run.size != "gpu",
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
                seed=run.seed,
            )
            trainer = _Trainer(
                model=Wrapped(model),
                args=arguments,
                optimizers=(configured["optimizer"], configured["lr_scheduler"]["scheduler"]),
                callbacks=[watch],
            )
            trainer.watch = watch
            trainer.loader = workload.train_loader(run.seed)
            trainer.train()
        device = next(model.parameters()).device
        return {**evaluate(model, workload, device), **workload.finish(model)}


class Wrapped(nn.Module):
    """Returns the loss in the form that the Trainer asks for."""

    def __init__(self, model: Learner) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> dict[str, torch.Tensor]:
        return {"loss": self.model.loss(batch)}


class _Loader:
    """The workload's own loader, its batches named as the model's argument."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader
        self.dataset, self.batch_size = loader.dataset, loader.batch_size

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Any:
        for batch in self.loader:
            yield {"batch": batch}


class _Trainer(Trainer):
    loader: DataLoader
    watch: _Metered

    def get_train_dataloader(self) -> _Loader:
        return _Loader(self.loader)

    def training_step(self, model: nn.Module, inputs: Mapping[str, Any], *args: Any) -> torch.Tensor:
        self.watch.kind = shapes(inputs["batch"])
        return super().training_step(model, inputs, *args)


class _Metered(TrainerCallback):
    """Tells the meter what the Trainer does. A step is counted whole, its optimizer included."""

    def __init__(self, meter: Meter, workload: Workload, every: int) -> None:
        self.meter, self.workload, self.every = meter, workload, every
        self.kind = ""
        self._counting = ExitStack()
        self._tell: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.meter.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **kwargs: Any) -> None:
        if self.meter.wants_count():
            self._tell = self._counting.enter_context(self.meter.counting(model, _bare(optimizer)))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        if self._tell is None:
            self.meter.step(self.kind)
        else:
            self._tell(self.kind)
            self._tell = None
            self._counting.close()
        if state.global_step % self.every == 0:
            self.meter.pause()
            inner = model.model
            self.meter.evaluated(**evaluate(inner, self.workload, next(inner.parameters()).device))
            self.meter.resume()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.meter.stop()


def _bare(optimizer: Any) -> Any:
    """What accelerate has wrapped."""
    return getattr(optimizer, "optimizer", optimizer)
