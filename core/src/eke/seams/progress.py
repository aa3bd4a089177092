"""Optimizer steps, batches, samples and tokens of a run, right under accumulation and after a resume.

The trick it hides: ``trainer.global_step`` counts optimizer steps only where Lightning itself accumulates;
DeepSpeed accumulates out of Lightning's sight, and there it counts batches.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.data import extract_batch_size


class Progress:
    """What has been done so far, over all processes.

    Attributes:
        micro_steps: Batches trained on, per process.
        samples: Samples trained on, all processes together; counted only if asked for.
        tokens: Integers in the batches' integer tensors of two dimensions, (batch, length), all processes
            together; counted only if asked for.
        at_boundary: The batch at hand is the first of an accumulation window: no gradient is held, so the
            model may change its shape.
    """

    def __init__(self) -> None:
        self.micro_steps = 0
        self.samples = 0
        self.tokens = 0
        self.at_boundary = True
        self.counts: frozenset[str] = frozenset()
        self.trainer: Trainer | None = None  # while in fit
        self._steps = 0

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        trainer = self.trainer
        if trainer is None:
            return self._steps
        if trainer.strategy.handles_gradient_accumulation:
            return trainer.global_step // trainer.accumulate_grad_batches
        return trainer.global_step

    def connect(self, trainer: Trainer | None, counts: frozenset[str] = frozenset()) -> None:
        self._steps = self.steps
        self.trainer = trainer
        self.counts = counts

    def before_batch(self, trainer: Trainer, batch_idx: int) -> None:
        # Lightning starts a new window at each epoch, so the index in the epoch decides.
        self.at_boundary = batch_idx % trainer.accumulate_grad_batches == 0

    def after_batch(self, trainer: Trainer, batch: Any) -> None:
        self.micro_steps += 1
        if "samples" in self.counts:
            self.samples += extract_batch_size(batch) * trainer.world_size
        if "tokens" in self.counts:
            self.tokens += _tokens(batch) * trainer.world_size

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps, "micro_steps": self.micro_steps, "samples": self.samples, "tokens": self.tokens}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._steps = state["steps"]
        self.micro_steps = state["micro_steps"]
        self.samples = state["samples"]
        self.tokens = state["tokens"]


def _tokens(batch: Any) -> int:
    """Elements of the first integer tensor with two dimensions: the ids, not the labels beside them."""
    items = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else [batch]
    for item in items:
        if isinstance(item, torch.Tensor) and item.ndim == 2 and not item.is_floating_point():
            return item.numel()
    return 0
