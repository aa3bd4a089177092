"""Around the forward and backward of a step: no-sync, silent logging, the loss that a step returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


def no_sync(trainer: Trainer) -> AbstractContextManager[None]:
    """Leave out DDP's gradient reduction inside; nothing under other strategies."""
    model = trainer.strategy.model
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def loss_of(output: Tensor | Mapping[str, Any]) -> Tensor:
    """The loss in what ``training_step`` returned."""
    return output if isinstance(output, Tensor) else output["loss"]


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


def fails_too(step: Callable[..., Any], *arguments: Any) -> bool:
    """Whether a step fails without what a technique did to it as well, so that its error is not the technique's.

    For a run that ends with the error in either case: logs and random numbers are not looked after.
    """
    try:
        with torch.no_grad():
            step(*arguments)
    except Exception:
        return True
    return False
