"""Random layerwise token dropping: each middle block trains on some tokens of a sample, the others pass it by.

Source: Yao, Wu, Li, Holmes, Ruwase, He and others, "Random-LTD: Random and Layerwise Token Dropping Brings Efficient
Training for Large-scale Transformers", 2022, https://arxiv.org/abs/2211.11586, section 3. Survey section 2.2.
"""

from __future__ import annotations

import inspect
from math import isfinite
from typing import Any, ClassVar

import torch
from eke import Run, Technique, TechniqueCallback
from eke.seams import interceptor
from eke.seams.blocks import Blocks, find_attention, find_blocks
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from eke_random_ltd.entry import RECORD

# What blocks of known models get beside the hidden states, and that goes by token.
_MASKS = ("attention_mask", "src_mask", "mask", "attn_mask")
_PER_TOKEN = ("position_ids", "src_key_padding_mask", "key_padding_mask", "padding_mask")
_ROTARY = ("position_embeddings",)
_OTHER_SEQUENCE = ("encoder_hidden_states", "encoder_attention_mask", "memory")


def tokens_at(step: float, duration: float, start: float, full: int, multiple: int) -> int:
    """Tokens on which a middle block runs at an optimizer step: a line from ``start`` to all of them.

    ``floor(step / duration (full - start) + start)``, less its remainder by ``multiple``, and at least 1.

    Args:
        step, duration: In optimizer steps. From ``duration`` on it is all tokens.
        start: A share of the tokens up to 1, or a number of tokens above 1.
        full: Tokens of a sample.
        multiple: Each length is a graph for ``torch.compile``.

    Source:
        Yao et al. 2022, section 3.2; the rounding is that of DeepSpeed's ``fixed_linear``.
    """
    least = min(full, round(start * full) if start <= 1 else int(start))
    if step >= duration or least >= full:
        return full
    tokens = int(step / duration * (full - least) + least)
    return max(1, min(full, tokens - tokens % multiple))


def draw_positions(batch: int, length: int, count: int, seed: int, device: torch.device) -> Tensor:
    """``count`` of ``length`` positions for each sample, without replacement: (batch, count), int64, rising.

    They follow from ``seed`` alone, so that a block which activation checkpointing runs again sees the same tokens.
    """
    numbers = torch.Generator(device).manual_seed(seed)
    order = torch.rand(batch, length, generator=numbers, device=device).argsort(1)
    return order[:, :count].sort(1).values


def cut_side_inputs(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any], positions: Tensor, length: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's other inputs, cut to the tokens that take part.

    Attention masks, (batch, heads, length, length) or (batch, 1, 1, length), padding masks and position ids, (batch,
    length), and rotary embeddings, (batch, length, size), lose the other tokens. A mask of one kind for all samples,
    (length, length), is cut to its first rows and columns where the block is told that it is causal.

    Args:
        names: Of the positional arguments, in order.
        args, kwargs: Without the hidden states.
        positions: (batch, count).
        length: Tokens of a sample.

    Raises:
        RuntimeError: another input that has an entry for each token: nobody said what it means.
    """
    causal = bool(kwargs.get("is_causal"))
    cut = [_cut(name, value, positions, length, causal) for name, value in zip(names, args, strict=False)]
    named = {name: _cut(name, value, positions, length, causal) for name, value in kwargs.items()}
    return tuple(cut), named


class RandomLTD(TechniqueCallback):
    """Run the middle blocks on a random part of the tokens while training. The first and the last block see all.

    Example::

        trainer = Trainer(max_steps=10_000, callbacks=[RandomLTD(start=0.25)])

    Args:
        start: Tokens on which a middle block runs at the first step: a share up to 1, or a number above 1.
        duration: When it is all of them: a share of the run up to 1, or a number of optimizer steps.
        multiple: The number of tokens is rounded down to a multiple of this.
        blocks: Dotted path of the list of blocks. Needed where a model has more than one.

    Raises:
        ValueError: numbers that make no schedule; fewer than three blocks; attention that has the batch second.
        MisconfigurationException: a share of a run of unknown length.
        RuntimeError: a block gets an input with an entry for each token that is not known here.
    """

    technique: ClassVar[Technique] = RECORD

    def __init__(
        self, start: float = 0.25, *, duration: float = 0.7, multiple: int = 8, blocks: str | None = None
    ) -> None:
        if start <= 0 or (start > 1 and start != int(start)):
            raise ValueError(f"start={start}: give a share of the tokens up to 1, or a whole number of them.")
        if duration <= 0 or (duration > 1 and duration != int(duration)):
            raise ValueError(f"duration={duration}: give a share of the run up to 1, or optimizer steps.")
        if multiple < 1:
            raise ValueError(f"multiple={multiple}: give 1 or more.")
        self.start, self.duration, self.multiple, self.blocks = start, duration, multiple, blocks
        self._found: Blocks | None = None
        self._held: list[Any] = []
        self._steps = 0.0
        self._rank = 0
        self._choices: list[Choose] = []

    def alter_model(self, run: Run) -> None:
        pl_module = run.module
        self._found = find_blocks(pl_module, self.blocks)
        if len(self._found) < 3:
            raise ValueError(
                f"{self._found.path} has {len(self._found)} blocks. The first and the last always see all tokens, so "
                "that RandomLTD needs three or more."
            )
        for attention in find_attention(self._found[1]):
            if attention.kind == "torch" and not attention.module.batch_first:
                raise ValueError(
                    f"{self._found.path}: the attention has the batch second. RandomLTD draws tokens for each sample "
                    "and needs nn.MultiheadAttention(batch_first=True)."
                )

    def end_run(self, run: Run) -> None:
        interceptor.detach(self._held, RECORD.name)
        self._held = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rank, self._steps = trainer.global_rank, self.duration
        if self.duration <= 1:
            total = trainer.estimated_stepping_batches
            if not isfinite(total):
                raise MisconfigurationException(
                    f"RandomLTD(duration={self.duration}) is a share of a run whose length is not known. Give "
                    "Trainer(max_steps=...), or duration= in optimizer steps."
                )
            self._steps = self.duration * total

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.start == 1 or self.progress.steps >= self._steps:
            self._choices = []
            return
        seed = int(torch.randint(2**40, (), generator=self.generator))
        middle = self._middle()
        self._choices = [
            Choose(self, self.progress.steps, seed * 4096 + 64 * number + self._rank) for number in range(len(middle))
        ]
        for block, choose in zip(middle, self._choices, strict=True):
            interceptor.put(block, RECORD.name, interceptor.Select(choose, Side(block, choose)))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for block in self._held if self._choices else ():  # validation sees all tokens everywhere
            interceptor.put(block, RECORD.name)

    def step_kind(self) -> str:
        return f"{self._choices[0].count or 'all'} tokens in the middle" if self._choices else "all tokens"

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "_found": None,
            "_held": [],
            "_choices": [],
        }  # a copy meets its model anew

    def _middle(self) -> list[Any]:
        """The middle blocks of the moment: another technique may have added some."""
        now = list(self._found.container)[1:-1]
        if len(now) != len(self._held) or any(new is not old for new, old in zip(now, self._held, strict=True)):
            interceptor.detach([old for old in self._held if not any(old is new for new in now)], RECORD.name)
            interceptor.attach(now, RECORD.name)
            self._held = now
        return now


class Choose:
    """Which tokens one block sees in one batch."""

    def __init__(self, ltd: RandomLTD, step: int, seed: int) -> None:
        self.schedule = (step, ltd._steps, ltd.start)
        self.multiple, self.seed = ltd.multiple, seed
        self.length = self.count = 0

    def __call__(self, hidden: Tensor) -> Tensor | None:
        if hidden.ndim != 3:
            raise RuntimeError(
                f"RandomLTD met hidden states of shape {tuple(hidden.shape)} and needs (batch, length, width): blocks "
                "with windows or images inside cannot leave tokens out."
            )
        self.length = hidden.shape[1]
        self.count = tokens_at(*self.schedule, self.length, self.multiple)
        if self.count == self.length:
            return None
        return draw_positions(len(hidden), self.length, self.count, self.seed, hidden.device)


class Side:
    """Cuts what else one block gets to its tokens."""

    def __init__(self, block: Any, choose: Choose) -> None:
        self.names = tuple(inspect.signature(type(block).forward).parameters)[2:]  # after self and the hidden states
        self.choose = choose

    def __call__(self, args: Any, kwargs: Any, positions: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return cut_side_inputs(self.names, args, kwargs, positions, self.choose.length)


def _cut(name: str, value: Any, positions: Tensor, length: int, causal: bool) -> Any:
    if name in _ROTARY and isinstance(value, tuple):
        return tuple(_rows(part, positions) if _has(part, length) else part for part in value)
    if not _has(value, length) or name in _OTHER_SEQUENCE:
        return value
    if name in _MASKS and value.ndim == 4 and value.shape[-1] == length:
        mask = value.expand(len(positions), *value.shape[1:])
        if mask.shape[2] == length:
            mask = mask.gather(2, _spread(positions[:, None, :, None], mask.shape, 2))
        return mask.gather(3, _spread(positions[:, None, None, :], mask.shape, 3))
    if name in (*_MASKS, *_PER_TOKEN) and value.ndim == 2 and value.shape[1] == length:
        of_pairs = name in _MASKS and value.shape[0] == length
        if not of_pairs:
            return _rows(value, positions)
        if causal:
            return value[: positions.shape[1], : positions.shape[1]]  # positions rise: the earlier ones come first
    raise RuntimeError(
        f"The block also gets {name} of shape {tuple(value.shape)}, with one entry for each of {length} tokens. "
        "RandomLTD does not know how to cut it to the tokens that take part: leave the technique out here."
    )


def _has(value: Any, length: int) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_has(part, length) for part in value)
    return isinstance(value, Tensor) and length in value.shape


def _rows(value: Tensor, positions: Tensor) -> Tensor:
    """(batch or 1, length, ...) at the positions of each sample."""
    value = value.expand(len(positions), *value.shape[1:])
    index = positions.reshape(*positions.shape, *[1] * (value.ndim - 2))
    return value.gather(1, _spread(index, value.shape, 1))


def _spread(index: Tensor, shape: torch.Size, along: int) -> Tensor:
    return index.expand(*[size if at != along else index.shape[along] for at, size in enumerate(shape)])
