"""Random layerwise token dropping: each middle block trains on some tokens of a sample, the others pass it by.

Source: Yao, Wu, Li, Holmes, Ruwase, He and others, "Random-LTD: Random and Layerwise Token Dropping Brings Efficient
Training for Large-scale Transformers", 2022, https://arxiv.org/abs/2211.11586, section 3. Survey section 2.2.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from eke import EkeError, Run, Technique, TechniqueCallback, in_run
from eke.seams import interceptor
from eke.seams.blocks import find_all_blocks, find_attention
from eke.seams.patches import relative_positions
from eke.seams.progress import Until
from eke.seams.step import fails_too
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from eke_random_ltd.entry import RECORD

# What blocks of known models get beside the hidden states, and that goes by token.
_MASKS = ("attention_mask", "src_mask", "tgt_mask", "mask", "attn_mask", "position_bias")
_PER_TOKEN = (
    "position_ids",
    "src_key_padding_mask",
    "tgt_key_padding_mask",
    "key_padding_mask",
    "padding_mask",
    "cache_position",
)
_ROTARY = ("position_embeddings",)
_OTHER_SEQUENCE = ("encoder_hidden_states", "memory", "memory_key_padding_mask")
_FROM_OTHER = (
    "encoder_attention_mask",
    "encoder_decoder_position_bias",
    "memory_mask",
)  # its tokens by those of another


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
    length), rotary embeddings, (batch, length, size), and position biases, (1, heads, length, length), lose the other
    tokens; masks and biases of attention to another sequence lose rows alone. A mask of one kind for all samples,
    (length, length), is cut to its first rows and columns where the block is told that it is causal.

    Args:
        names: Of the positional arguments, in order.
        args, kwargs: Without the hidden states.
        positions: (batch, count).
        length: Tokens of a sample.

    Raises:
        RandomLTDError: another input that has an entry for each token: nobody said what it means.
    """
    causal = bool(kwargs.get("is_causal") or kwargs.get("tgt_is_causal"))
    cut = [_cut(name, value, positions, length, causal) for name, value in zip(names, args, strict=False)]
    named = {name: _cut(name, value, positions, length, causal) for name, value in kwargs.items()}
    return tuple(cut), named


class RandomLTDError(EkeError, MisconfigurationException, ValueError, RuntimeError):
    """An argument, a model or a run with which middle blocks cannot see a part of the tokens."""


class RandomLTD(TechniqueCallback):
    """Run the middle blocks on a random part of the tokens while training. The first and the last block see all.

    Example::

        trainer = Trainer(max_steps=10_000, callbacks=[RandomLTD(start=0.25)])

    Args:
        start: Tokens on which a middle block runs at the first step: a share up to 1, or a number above 1.
        duration: When it is all of them: a share of the run up to 1, a number of optimizer steps, or words.
        multiple: The number of tokens is rounded down to a multiple of this.
        blocks: Dotted paths of lists of blocks, one or several. By default all of three blocks or more: those of an
            encoder and a decoder, of two towers. The first and the last of each list see all tokens.

    Raises:
        RandomLTDError: numbers that make no schedule; fewer than three blocks; attention that has the batch second; a
            share of a run of unknown length; a block that gets an input with an entry for each token that is not known
            here; a model that fails on a part of its tokens.
    """

    technique: ClassVar[Technique] = RECORD
    _middle: interceptor.InterceptedBlocks | None = in_run(None)
    _until: Until | None = in_run(None)
    _choices: list[Choose] = in_run(list)

    def __init__(
        self,
        start: float = 0.25,
        *,
        duration: float | str = 0.7,
        multiple: int = 8,
        blocks: str | Sequence[str] | None = None,
    ) -> None:
        if start <= 0 or (start > 1 and start != int(start)):
            raise RandomLTDError(f"start={start}: give a share of the tokens up to 1, or a whole number of them.")
        if not isinstance(duration, str) and (duration <= 0 or (duration > 1 and duration != int(duration))):
            raise RandomLTDError(f"duration={duration}: give a share of the run up to 1, or optimizer steps.")
        if multiple < 1:
            raise RandomLTDError(f"multiple={multiple}: give 1 or more.")
        self.start, self.duration, self.multiple, self.blocks = start, duration, multiple, blocks

    def check(self, run: Run) -> None:
        if run.fitting:
            self._until = run.until(self.duration, "duration")

    def alter_model(self, run: Run) -> None:
        found = find_all_blocks(run.module, self.blocks)
        served = [one for one in found if len(one) > 2]
        if not served or (self.blocks is not None and len(served) < len(found)):
            short = next(one for one in found if len(one) < 3)
            raise RandomLTDError(
                f"{short.path} has {len(short)} blocks. The first and the last always see all tokens, so that "
                "RandomLTD needs three or more."
            )
        for one in served:
            if pairs := relative_positions(one.container):
                raise RandomLTDError(
                    f"The blocks at {one.path!r} hold relative positions ({pairs[0]}), for all tokens in their places, "
                    "and cannot leave some out. RandomLTD serves blocks without; leave it out here."
                )
            for attention in find_attention(one[1]):
                if attention.kind == "torch" and not attention.module.batch_first:
                    raise RandomLTDError(
                        f"{one.path}: the attention has the batch second. RandomLTD draws tokens for each sample and "
                        "needs nn.MultiheadAttention(batch_first=True)."
                    )
        self._middle = run.blocks(served, slice(1, -1))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._choices = []
        if self.start == 1 or self._until.reached:
            return
        seed = self.run.seed() * 4096 + self.run.rank
        for block in self._middle.now():
            choose = Choose(self._until.done, self.start, self.multiple, seed + 64 * len(self._choices))
            self._middle.put(block, interceptor.Select(choose, Side(block, choose)))
            self._choices.append(choose)

    def around_step(self, run: Run, call_next: Any, batch: Any, *args: Any) -> Any:
        try:
            return call_next(batch, *args)
        except (RuntimeError, ValueError) as error:
            cut = any(choose.cut for choose in self._choices)
            self._middle.clear()
            if not cut or isinstance(error, (EkeError, torch.OutOfMemoryError)) or fails_too(call_next, batch, *args):
                raise  # not of our making
            said = str(error).rstrip(".")
            configs = [getattr(part, "config", None) for part in run.module.modules()]
            routes = any(getattr(config, "output_router_logits", False) for config in configs)
            advice = (
                "A router's loss counts them by attention_mask: leave that out of the batch if nothing is padded, or "
                "switch the loss off (output_router_logits=False)"
                if routes
                else "Switch off outputs of each block"
            )
            raise RandomLTDError(
                f"The model failed where middle blocks see a part of the tokens: {said}. What it computes beside the "
                f"blocks has to take any number of them. {advice}, or leave RandomLTD out."
            ) from error

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._choices:  # validation sees all tokens everywhere
            self._middle.clear()

    def step_kind(self) -> str:
        return f"{self._choices[0].count or 'all'} tokens in the middle" if self._choices else "all tokens"


class Choose:
    """Which tokens one block sees in one batch.

    Args:
        done: How much of the way to all tokens is done, from 0 to 1.
        start, multiple: As of :class:`RandomLTD`.
        seed: Of the draw.
    """

    def __init__(self, done: float, start: float, multiple: int, seed: int) -> None:
        self.done, self.start, self.multiple, self.seed = done, start, multiple, seed
        self.length = self.count = 0

    @property
    def cut(self) -> bool:
        """Whether it has left tokens out."""
        return self.count < self.length

    def __call__(self, hidden: Tensor) -> Tensor | None:
        if hidden.ndim != 3:
            raise RandomLTDError(
                f"RandomLTD met hidden states of shape {tuple(hidden.shape)} and needs (batch, length, width): blocks "
                "with windows or images inside cannot leave tokens out."
            )
        self.length = hidden.shape[1]
        self.count = tokens_at(self.done, 1, self.start, self.length, self.multiple)
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
    if name in _FROM_OTHER:
        if value.ndim == 2 and len(value) != len(positions) and len(value) == length:
            value = value[None, None]  # (length, others) for all samples
        if value.ndim != 4 or value.shape[2] != length:
            return value  # one row for all tokens: (batch, others), (batch, 1, 1, others)
        mask = value.expand(len(positions), *value.shape[1:])
        return mask.gather(2, _spread(positions[:, None, :, None], mask.shape, 2))
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
    raise RandomLTDError(
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
