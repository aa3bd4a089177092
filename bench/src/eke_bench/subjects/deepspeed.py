"""DeepSpeed's engine around the workload's own model, optimizer and schedule, in one process and without sharding."""

from __future__ import annotations

import os
import socket
from contextlib import nullcontext
from typing import Any

import torch
from eke.spec import EkeError
from torch import nn

from eke_bench.meter import Meter
from eke_bench.store import Run
from eke_bench.subjects.hand import evaluate, move
from eke_bench.subjects.lightning import shapes
from eke_bench.workloads import Learner, Workload
from eke_bench.workloads.base import endless

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read at import

import deepspeed


class DeepSpeed:
    def fit(self, run: Run, workload: Workload, meter: Meter) -> dict[str, float]:
        if run.recipe:
            raise EkeError(f"DeepSpeed takes no Eke techniques; it was given {', '.join(run.recipe)}.")
        torch.manual_seed(run.seed)
        model = workload.model(run.shape, run.lr, run.steps)
        configured = model.configure_optimizers()
        _one_process(cuda=run.size == "gpu")
        config = {
            "train_micro_batch_size_per_gpu": workload.size.batch,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 0},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": run.size == "gpu"},
        }
        engine, *_ = deepspeed.initialize(
            model=Wrapped(model),
            optimizer=configured["optimizer"],
            lr_scheduler=configured["lr_scheduler"]["scheduler"],
            config=config,
            dist_init_required=False,
        )
        every = max(1, run.steps // workload.size.evaluations)
        batches = endless(workload.train_loader(run.seed))
        meter.start()
        for number in range(1, run.steps + 1):
            batch = move(next(batches), engine.device)
            counting = meter.counting(model, configured["optimizer"]) if meter.wants_count() else None
            with counting or nullcontext() as tell:
                engine.backward(engine(batch))
                engine.step()
                if tell is not None:
                    tell(shapes(batch))
            if counting is None:
                meter.step(shapes(batch))
            if number % every == 0:
                meter.pause()
                meter.evaluated(**evaluate(model, workload, engine.device))
                meter.resume()
        meter.stop()
        return {**evaluate(model, workload, engine.device), **workload.finish(model)}


class Wrapped(nn.Module):
    """The engine calls ``forward``; the loss is what it has to return."""

    def __init__(self, model: Learner) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> torch.Tensor:
        return self.model.loss(batch)


def _one_process(cuda: bool) -> None:
    if torch.distributed.is_initialized():
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    deepspeed.init_distributed("nccl" if cuda else "gloo", verbose=False)
