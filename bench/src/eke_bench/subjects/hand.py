"""A training loop written by hand: what the Trainer, and everybody else, is held against."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from eke.spec import EkeError
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from eke_bench.meter import Meter
from eke_bench.store import Run
from eke_bench.subjects.lightning import shapes
from eke_bench.workloads import Learner, Workload
from eke_bench.workloads.base import endless


class Hand:
    """Plain PyTorch. Subclasses change the model or the optimizer before the first step."""

    def prepare(self, model: Learner, run: Run) -> nn.Module:
        """What is trained; it keeps ``loss`` and ``measures``."""
        return model

    def optimizer(self, model: nn.Module, built: Optimizer) -> Optimizer:
        """In place of the AdamW that the workload built."""
        return built

    def fit(self, run: Run, workload: Workload, meter: Meter) -> dict[str, float]:
        if run.recipe:
            raise EkeError(f"a loop by hand takes no techniques; it was given {', '.join(run.recipe)}.")
        torch.manual_seed(run.seed)
        device = torch.device("cuda" if run.size == "gpu" else "cpu")
        model = self.prepare(workload.model(run.shape, run.lr, run.steps), run).to(device)
        configured = model.configure_optimizers()
        schedule = configured["lr_scheduler"]["scheduler"]
        optimizer = self.optimizer(model, configured["optimizer"])
        if optimizer is not configured["optimizer"]:
            schedule = LambdaLR(optimizer, schedule.lr_lambdas)
        every = max(1, run.steps // workload.size.evaluations)
        half = torch.autocast(device.type, torch.bfloat16) if device.type == "cuda" else nullcontext()
        batches = endless(workload.train_loader(run.seed))
        meter.start()
        for number in range(1, run.steps + 1):
            batch = move(next(batches), device)
            counting = meter.counting(model, optimizer) if meter.wants_count() else None
            with counting or nullcontext() as tell:
                with half:
                    loss = model.loss(batch)
                loss.backward()
                nn.utils.clip_grad_norm_(_weights(optimizer), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                if tell is not None:
                    tell(shapes(batch))
            if counting is None:
                meter.step(shapes(batch))
            if number % every == 0:
                meter.pause()
                final = evaluate(model, workload, device)
                meter.evaluated(**final)
                meter.resume()
        meter.stop()
        return {**evaluate(model, workload, device), **workload.finish(model)}


def _weights(optimizer: Optimizer) -> list[nn.Parameter]:
    """In the order of the optimizer, as Lightning clips: a norm summed in another order differs in its last bit."""
    return [weight for group in optimizer.param_groups for weight in group["params"]]


@torch.no_grad()
def evaluate(model: Any, workload: Workload, device: torch.device) -> dict[str, float]:
    """Held-out measures, averaged over samples."""
    model.eval()
    sums: dict[str, float] = {}
    count = 0
    for batch in workload.val_loader():
        batch = move(batch, device)
        samples = len(batch) if isinstance(batch, torch.Tensor) else len(batch[0])
        count += samples
        for name, value in model.measures(batch).items():
            sums[name] = sums.get(name, 0.0) + float(value) * samples
    model.train()
    return {name: value / count for name, value in sums.items()}


def move(batch: Any, device: torch.device) -> Any:
    """A batch, a tensor or a list of tensors, on another device."""
    if isinstance(batch, (list, tuple)):
        return type(batch)(move(part, device) for part in batch)
    return batch.to(device)
