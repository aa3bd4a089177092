"""Sequence-length warm-up: train on short sequences first and let them grow to their full length.

Source: Li, Zhang, He, "The Stability-Efficiency Dilemma: Investigating Sequence Length Warmup for Training GPT Models",
NeurIPS 2022, https://arxiv.org/abs/2108.06084, section 4. Survey section 2.1.
"""

from __future__ import annotations

from math import isfinite
from typing import Any, ClassVar, Literal

from eke import Run, Technique, TechniqueCallback
from eke.seams import batch as batches
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from eke_length_warmup.entry import RECORD


def length_at(step: float, duration: float, start: int, full: int, multiple: int) -> int:
    """Length of the sequences at an optimizer step: a straight line from ``start`` to ``full`` at ``duration`` steps.

    Rounded down to a multiple; never below the smaller of ``start`` and ``full``, nor above ``full``, which comes as
    it is, a multiple or not.

    Source:
        Li et al. 2022, section 4, the linear pacing function.
    """
    if step >= duration or start >= full:
        return full
    length = start + (full - start) * step / duration
    return min(full, max(start, int(length) // multiple * multiple))


def shorten(batch: Any, length: int) -> Any:
    """Cut every sequence of a batch, in whatever container, to its first ``length`` tokens."""
    full = sequence_length(batch)
    return batches.mapped(batch, lambda tensor: _cut(tensor, full, length))


def split(batch: Any, length: int) -> Any:
    """Split every sequence into rows of ``length`` tokens; a rest that fills no row is left out.

    Raises:
        ValueError: a tensor has one entry a sample, or an attention mask of pairs: neither can be split.
    """
    full = sequence_length(batch)
    return batches.mapped(batch, lambda tensor: _rows(tensor, full, length))


def sequence_length(batch: Any) -> int:
    """Length of a batch's sequences: the second dimension of its token ids, whole numbers of shape (batch, length).

    Raises:
        ValueError: there are none, or of several lengths.
    """
    tensors = list(batches.tensors(batch))
    lengths = {tensor.shape[1] for tensor in tensors if tensor.ndim == 2 and not tensor.is_floating_point()}
    if len(lengths) != 1:
        shapes = ", ".join(f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" for tensor in tensors)
        raise ValueError(
            f"LengthWarmup found no single length of sequences in a batch of {shapes or 'no tensors'}: it needs token "
            "ids, whole numbers of shape (batch, length), all of one length. Leave it out here."
        )
    return lengths.pop()


class LengthWarmup(TechniqueCallback):
    """Train on short sequences first. Validation has them whole.

    Example::

        trainer = Trainer(max_steps=10_000, callbacks=[LengthWarmup(start=64)])

    Args:
        start: Tokens of a sequence at the first step. Sequences that are no longer stay as they are.
        duration: When the full length is reached: a share of the run, between 0 and 1, or a number of optimizer steps.
        multiple: Lengths are rounded down to a multiple of this. Each length is a graph for ``torch.compile``.
        mode: ``"truncate"``: the rest of a sequence is left out, so that a step sees fewer tokens and takes less time.
            ``"reshape"``: a sequence is split into several, so that a step sees as many tokens, and only attention
            costs less.

    Raises:
        ValueError: numbers that make no schedule; a batch without token ids.
        MisconfigurationException: a share of a run of unknown length.
    """

    technique: ClassVar[Technique] = RECORD

    def __init__(
        self,
        start: int = 64,
        *,
        duration: float = 0.3,
        multiple: int = 8,
        mode: Literal["truncate", "reshape"] = "truncate",
    ) -> None:
        if start < 2 or multiple < 1:
            raise ValueError(f"start={start}, multiple={multiple}: give 2 tokens or more, and a multiple of 1 or more.")
        if duration <= 0 or (duration > 1 and duration != int(duration)):
            raise ValueError(f"duration={duration}: give a share of the run between 0 and 1, or optimizer steps.")
        if mode not in ("truncate", "reshape"):
            raise ValueError(f"mode={mode!r} is none of: truncate, reshape.")
        self.start, self.duration, self.multiple, self.mode = start, duration, multiple, mode
        self._steps = 0.0
        self._length = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps = self.duration
        if self.duration <= 1:
            total = trainer.estimated_stepping_batches
            if not isfinite(total):
                raise MisconfigurationException(
                    f"LengthWarmup(duration={self.duration}) is a share of a run whose length is not known. Give "
                    "Trainer(max_steps=...), or duration= in optimizer steps."
                )
            self._steps = self.duration * total

    def alter_batch(self, run: Run, batch: Any) -> Any:
        if self.progress.steps >= self._steps:
            self._length = 0
            return batch
        full = sequence_length(batch)
        self._length = length_at(self.progress.steps, self._steps, self.start, full, self.multiple)
        if self._length == full:
            return batch
        return (shorten if self.mode == "truncate" else split)(batch, self._length)

    def step_kind(self) -> str:
        return f"length {self._length}" if self._length else "full length"


def _cut(tensor: Tensor, full: int, length: int) -> Tensor:
    if tensor.ndim >= 2 and tensor.shape[1] == full:
        tensor = tensor[:, :length]
    if tensor.ndim == 4 and tensor.shape[-2:] == (full, full):  # an attention mask of pairs
        tensor = tensor[..., :length, :length]
    return tensor


def _rows(tensor: Tensor, full: int, length: int) -> Tensor:
    if tensor.ndim < 2 or tensor.shape[1] != full:
        raise ValueError(
            f"LengthWarmup(mode='reshape') makes several sequences of one, and the batch has a tensor of shape "
            f"{tuple(tensor.shape)}, which is not one entry a token. Use mode='truncate'."
        )
    rows = full // length
    return tensor[:, : rows * length].reshape(tensor.shape[0] * rows, length, *tensor.shape[2:])
