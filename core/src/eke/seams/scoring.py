"""A look at a batch before a step trains on some of its samples.

The tricks it hides: the look must not log, keep a graph, draw dropout or move running statistics; and autocast keeps
casts of weights that a pass without graph made, through which the step would then have no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from eke.seams.batch import size
from eke.seams.losses import Capture, LossError, capture
from eke.seams.step import muted, notes_kept


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each submodule has its own mode back."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Running statistics of normalizations are as before afterwards, whatever ran inside."""
    kept = [
        (buffer, buffer.clone())
        for part in module.modules()
        if getattr(part, "track_running_stats", False)
        for buffer in part.buffers(recurse=False)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


def check_scorable(pl_module: LightningModule) -> None:
    """Refuse a module whose ``training_step`` cannot be taken without training.

    Raises:
        LossError: it optimizes by hand.
    """
    if not pl_module.automatic_optimization:
        raise LossError(
            f"{type(pl_module).__name__} optimizes by hand within training_step (automatic_optimization=False), which "
            "therefore cannot be run to look at losses alone. Let Lightning optimize, or score with a module whose "
            "training_step returns the loss."
        )


def scoring_pass(
    pl_module: LightningModule, step: Callable[..., Any], batch: Any, *args: Any, training: bool = False
) -> Capture:
    """What ``training_step`` gives for a batch, in evaluation mode and without a graph.

    Args:
        training: In the modes that the model is in, instead: dropout draws from the global random state, and running
            statistics stay what they were.

    Raises:
        LossError: losses that cannot be followed back to the samples; a module that optimizes by hand.
        BatchError: a batch whose number of samples is not known.
    """
    check_scorable(pl_module)
    mode = statistics_kept(pl_module) if training else evaluating(pl_module)
    with ExitStack() as stack:
        for part in (muted(pl_module), notes_kept(pl_module), mode, torch.no_grad()):
            stack.enter_context(part)
        captured = stack.enter_context(capture(size(batch), lambda losses: None, batch))
        step(batch, *args)
    torch.clear_autocast_cache()
    captured.check()
    return captured


def error_norms(captured: Capture) -> Tensor:
    """Length of the gradient of each sample's cross entropy by its logits, (batch,), float32, on the CPU.

    Up to a factor that all samples share it bounds the length of the whole gradient: Katharopoulos and Fleuret, ICML
    2018, https://arxiv.org/abs/1803.00942, equation 20. A sample of several tokens has the root of their squares' sum.

    Raises:
        LossError: the loss was no plain cross entropy.
    """
    logits, target, valid = captured.logits, captured.target, captured.valid
    if logits is None or valid is None:
        raise LossError(
            "The gradient by the logits is known of a plain cross_entropy, outside of compiled code. training_step "
            f"gave losses by {captured.source or 'nothing'} alone: choose by the loss, or call "
            "F.cross_entropy(logits, classes)."
        )
    logits = logits.float().movedim(1, -1) if logits.ndim > 1 else logits.float()
    classes = logits.shape[-1]
    wrong = logits.softmax(-1)
    if target.is_floating_point():
        target = target.float().movedim(1, -1) if target.ndim > 1 else target.float()
        wrong = wrong - target * (1 - captured.smoothing) - captured.smoothing / classes
    else:
        place = target.clamp(0, classes - 1).unsqueeze(-1)  # what is ignored counts 0 below
        wrong = wrong - captured.smoothing / classes
        wrong.scatter_add_(-1, place, torch.full_like(place, -(1 - captured.smoothing), dtype=wrong.dtype))
    squares = wrong.square().sum(-1).reshape(valid.shape) * valid.float()
    return squares.flatten(1).sum(1).sqrt().cpu() if squares.ndim > 1 else squares.sqrt().cpu()
