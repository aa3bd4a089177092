"""Around the forward and backward of a step: no-sync, silent logging, the loss that a step returns, extra passes that
leave no notes."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import Metric, MetricCollection

from eke import compat
from eke.seams import interceptor


def no_sync(trainer: Trainer) -> AbstractContextManager[None]:
    """Leave out DDP's gradient reduction inside; nothing under other strategies."""
    model = trainer.strategy.model
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def loss_of(output: Tensor | Mapping[str, Any]) -> Tensor:
    """The loss in what ``training_step`` returned."""
    return output if isinstance(output, Tensor) else output["loss"]


def log_own(trainer: Trainer, pl_module: LightningModule, owner: str, name: str, value: Tensor) -> None:
    """Log a number of a technique's own as ``eke/<owner>/<name>``, at the Trainer's interval: logging costs."""
    if compat.logs_now(trainer):
        pl_module.log(f"eke/{owner}/{name}", value.detach())


def with_graph(pl_module: LightningModule) -> Callable[..., Any]:
    """A layer around ``training_step``: where all blocks that train are skipped, the loss is a number that depends on
    nothing, and backward would fail. It is given the gradient that it has: zero, by one weight."""

    def around(call_next: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = call_next(*args, **kwargs)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor) or loss.requires_grad or not pl_module.automatic_optimization:
            return output
        trains = next((weight for weight in pl_module.parameters() if weight.requires_grad), None)
        if trains is None or not interceptor.skips(pl_module):
            return output  # the model's own affair
        loss = loss + 0 * trains.reshape(-1)[0]
        return {**output, "loss": loss} if isinstance(output, Mapping) else loss

    return around


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


@contextmanager
def notes_kept(pl_module: LightningModule) -> Iterator[None]:
    """What a step notes for itself is as before afterwards: an extra pass counts nothing twice.

    That is the state of torchmetrics anywhere in the module, and the module's own numbers, tensors, lists and
    dictionaries, such as ``self.losses.append(loss)``. Not what lies in other objects of the user's.
    """
    metrics = [one for one in pl_module.modules() if isinstance(one, (Metric, MetricCollection))]
    kept = [(one, {name: _copied(value) for name, value in _notes(one).items()}) for one in (pl_module, *metrics)]
    try:
        yield
    finally:
        for one, notes in kept:
            for name in _notes(one).keys() - notes.keys():
                del vars(one)[name]
            for name, (value, content) in notes.items():
                vars(one)[name] = _filled(value, content)


_NOTES = (type(None), bool, int, float, complex, str, list, dict, set, deque, Tensor)
_OF_MODULES = frozenset(vars(nn.Module()))  # parameters, buffers, hooks


def _notes(owner: nn.Module) -> dict[str, Any]:
    metric = not isinstance(owner, LightningModule)
    return {
        name: value
        for name, value in vars(owner).items()
        if name not in _OF_MODULES and isinstance(value, _NOTES) and (metric or not name.startswith("_"))
    }


def _copied(value: Any) -> tuple[Any, Any]:
    """A note and its content: of containers one level, which is what grows."""
    if isinstance(value, Tensor):
        return value, value if value.requires_grad else value.clone()
    return value, copy.copy(value) if isinstance(value, (list, dict, set, deque)) else value


@torch.no_grad()
def _filled(value: Any, content: Any) -> Any:
    if isinstance(value, Tensor):
        if value is not content:
            value.copy_(content)
    elif isinstance(value, (list, deque)):
        value.clear()
        value.extend(content)
    elif isinstance(value, (dict, set)):
        value.clear()
        value.update(content)
    return value


def step_arguments(pl_module: LightningModule, batch: Any, batch_idx: int) -> tuple[Any, ...]:
    """What Lightning would call ``training_step`` with, by place: the batch's index only if there is a place for it."""
    return (batch, batch_idx) if compat.takes_batch_idx(pl_module.training_step) else (batch,)


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
