"""Change the shape of a model in the middle of a run.

The tricks it hides: appending to a parameter group, or adding a group, trains well and fails on resume, because a
fresh process builds its groups in another order. So the user's own ``configure_optimizers`` is called again for the
model as it now is, and state moves over by parameter identity. DDP's reducer knows the old parameters and has to go
before a new one is built.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping

import torch
from lightning.pytorch import Trainer
from torch.nn.parallel import DistributedDataParallel

from eke.refusal import RunError
from eke.seams.optimizer import rebind, transplant
from eke.seams.wrapped import walk
from eke.strategies import imposed


def check_growable(trainer: Trainer, who: str) -> None:
    """Refuse a strategy under which a model cannot change its shape in mid-run.

    Raises:
        MisconfigurationException: the strategy shards parameters or owns the optimizer.
    """
    strategy = trainer.strategy
    if imposed(strategy):
        raise RunError(
            f"{who} changes the shape of the model in mid-run, which {type(strategy).__name__} cannot follow: it has "
            "sharded parameters or optimizer states, or built its own optimizer by then. Use one device or "
            "strategy='ddp', or save a checkpoint at the growth and start a new fit from it."
        )


def rebuild(trainer: Trainer, origin: Mapping[torch.Tensor, torch.Tensor]) -> None:
    """Make optimizers, schedulers and DDP follow a model whose parameters have just changed.

    Call it at the start of an accumulation window (``progress.at_boundary``): gradients are dropped.

    Args:
        trainer: In ``fit``.
        origin: New parameter to the old one whose optimizer state it takes as a copy. New parameters that are not
            named start without state.

    Raises:
        MisconfigurationException: as :func:`check_growable`.
        ValueError: the user's ``configure_optimizers`` builds another number of groups for the new model.
    """
    check_growable(trainer, "This technique")
    strategy = trainer.strategy
    module = strategy.lightning_module
    module.to(strategy.root_device)
    rewrap(trainer)
    before, configs = list(strategy.optimizers), list(strategy.lr_scheduler_configs)
    strategy.setup_optimizers(trainer)
    for old, new in zip(before, strategy.optimizers, strict=True):
        transplant(old, new, origin)
    rebind(configs, _pairs(before, strategy.optimizers))
    strategy.lr_scheduler_configs = configs


def rewrap(trainer: Trainer, drop: bool = True) -> None:
    """Drop all gradients and, under DDP, wrap the module anew: it has other parameters now, or others take part.

    Args:
        trainer: Whose strategy holds the module.
        drop: Whether gradients are dropped. Those of a window that a resumed run has begun with are to stay.
    """
    strategy = trainer.strategy
    for parameter in strategy.lightning_module.parameters() if drop else ():
        parameter.grad = None
    if isinstance(strategy.model, DistributedDataParallel):
        strategy.model = strategy.lightning_module
        gc.collect()  # the old reducer's hooks sit on the parameters until it is gone
        strategy.configure_ddp()


def _pairs(before, after):
    """``id`` of each old optimizer to the new one, those inside wrappers too."""
    pairs = {}
    for old, new in zip(before, after, strict=True):
        for inside, its_place in zip(walk(old), walk(new), strict=False):
            pairs[id(inside)] = its_place
    return pairs
