"""Around the forward and backward of a step: extra passes over an accumulation window, no-sync, silent logging.

The tricks it hides: an optimizer that calls Lightning's closure twice breaks accumulation and the gradient scaler and
logs the wrong loss; ``strategy.backward`` would fire every callback hook again; DDP must reduce only on a
window's last pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.nn.parallel import DistributedDataParallel


def no_sync(trainer: Trainer) -> AbstractContextManager[None]:
    """Leave out DDP's gradient reduction inside; nothing under other strategies."""
    model = trainer.strategy.model
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


@contextmanager
def muted(pl_module: LightningModule) -> Iterator[None]:
    """Drop what the module logs inside, so that an extra pass does not show up as another step's loss."""
    before = {name: vars(pl_module).get(name) for name in ("log", "log_dict")}
    for name in before:
        vars(pl_module)[name] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                vars(pl_module).pop(name)
            else:
                vars(pl_module)[name] = value


def step_arguments(pl_module: LightningModule, batch: Any, batch_idx: int) -> tuple[Any, ...]:
    """What Lightning would call ``training_step`` with: the batch's index goes to a second argument of any name."""
    takes_index = is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2)
    return (batch, batch_idx) if takes_index else (batch,)


def replay(trainer: Trainer, pl_module: LightningModule, window: list[tuple[Any, int]], scale: float = 1.0) -> None:
    """Run forward and backward again over the batches of an accumulation window, adding to ``.grad``.

    Call it from ``on_before_optimizer_step``: clipping and the optimizer's step then follow once, as usual.

    Args:
        trainer, pl_module: As given to the hook.
        window: ``(batch, batch_idx)`` of each batch since the last optimizer step.
        scale: The gradient scaler's factor, 1 without one. The gradients carry it.
    """
    accumulate = len(window)
    for i, (batch, batch_idx) in enumerate(window):
        last = i == accumulate - 1
        with muted(pl_module), nullcontext() if last else no_sync(trainer):
            output = trainer.strategy.training_step(*step_arguments(pl_module, batch, batch_idx))
            loss = output if isinstance(output, torch.Tensor) else output["loss"]
            trainer.precision_plugin.backward(loss / trainer.accumulate_grad_batches * scale, pl_module, None)
