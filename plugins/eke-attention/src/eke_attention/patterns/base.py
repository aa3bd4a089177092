"""What a pattern is: a function of batch, head, query and key (numbers, as tensors) that says whether the two meet.

Predicted ones are given pair by pair; here is also how much of the attention they keep.
"""

from __future__ import annotations

from typing import Any

import torch
from eke import ArgumentError
from torch import Tensor
from torch.nn import functional as F

from eke_attention.kernels import Call, Mod, grid, repeated, scores


class Pattern:
    """Base of all patterns. One object serves all layers; what belongs to a layer lies in ``layer``, a dict of its own.

    Activation checkpointing asks twice in a step: what a layer knows changes in :meth:`after_step` alone.

    Class attributes:
        fixed: The same for every batch: its blocks are found once for each length.
        per_head: Differs from head to head.
        wants_input: Needs ``layer["input"]``, what the attention module was given, (batch, length, width).
    """

    fixed = False
    per_head = False
    wants_input = False
    block = 64

    def mod(self, call: Call, layer: dict[str, Any], training: bool) -> Mod | None:
        """Which pairs meet, or None for all of them."""
        raise NotImplementedError

    def transform(self, call: Call, layer: dict[str, Any], training: bool) -> Call:
        """Change queries and keys before anything else."""
        return call

    def see_batch(self, batch: Any) -> Any:
        """Look at a batch before the step, and return it."""
        return batch

    def after_step(self, layers: dict[str, dict[str, Any]], steps: int, reduce: Any) -> None:
        """Learn from the step. ``reduce`` takes the mean of a tensor over processes."""

    def arguments(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if not name.startswith("_"))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.arguments()})"


def positive(**given: float) -> None:
    for name, value in given.items():
        if value <= 0:
            raise ArgumentError(f"{name}={value}: give a number above 0.")


class Predicted(Pattern):
    """A pattern that is predicted from queries and keys, pair by pair."""

    per_head = True

    def keeps(self, call: Call, layer: dict[str, Any], training: bool) -> Tensor | None:
        """Which pairs are kept, (batch, heads, queries, keys), bool, of those that may meet; or None for all."""
        raise NotImplementedError

    @torch.no_grad()
    def mod(self, call: Call, layer: dict[str, Any], training: bool) -> Mod | None:
        kept = self.keeps(repeated(call), layer, training)
        return None if kept is None else lambda b, h, q, k: kept[b, h, q, k]


def may_meet(call: Call) -> Tensor:
    """Pairs that the model itself lets meet, (batch or 1, heads or 1, queries, keys), bool."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    free = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=call.query.device)
    if call.causal:
        free = free.tril()
    if call.mask is not None:
        free = free & (call.mask if call.mask.dtype == torch.bool else call.mask > torch.finfo(call.mask.dtype).min / 2)
    return free


def or_best(kept: Tensor, predicted: Tensor, call: Call) -> Tensor:
    """Of those that may meet; a query that keeps nothing keeps its best."""
    free = may_meet(call)
    best = F.one_hot(predicted.nan_to_num(-1.0).argmax(-1), predicted.shape[-1]).bool()
    kept = kept & free
    return kept | (best & free & ~kept.any(-1, keepdim=True))


def quantize(x: Tensor, largest: Tensor, bits: int = 4) -> Tensor:
    """Symmetric quantization to ``2 ** bits - 1`` levels up to ``largest``, as float."""
    levels = 2 ** (bits - 1) - 1
    return (x * levels / largest).round().clamp(-levels, levels) * largest / levels


def adam(x: Tensor, gradient: Tensor, moments: Tensor, steps: int, lr: float) -> tuple[Tensor, Tensor]:
    """One step of Adam, the ``steps``-th, for what a pattern learns beside the model: the new values and moments."""
    first = 0.9 * moments[0] + 0.1 * gradient
    second = 0.999 * moments[1] + 0.001 * gradient**2
    change = first / (1 - 0.9**steps) / ((second / (1 - 0.999**steps)).sqrt() + 1e-8)
    return x - lr * change, torch.stack([first, second])


def pairs(pattern: Pattern, call: Call, layer: dict[str, Any], training: bool = False) -> Tensor:
    """The pattern of a call pair by pair, the model's own mask in it, (batch, heads, queries, keys), bool."""
    mod = pattern.mod(call, layer, training)
    batch, heads, queries, _ = call.query.shape
    free = may_meet(call).expand(batch, heads, queries, call.key.shape[2])
    return free if mod is None else free & grid(mod, batch, heads, queries, call.key.shape[2], call.query.device)


@torch.no_grad()
def recall(call: Call, kept: Tensor, share: float = 0.1) -> tuple[float, float]:
    """How much of the attention is kept: of each query's top pairs, and of its weight.

    Args:
        call: With queries and keys.
        kept: (batch, heads, queries, keys), bool.
        share: Of the pairs that may meet which count as the top, at least one.

    Returns:
        Share of the top pairs that is kept, and share of all weight.
    """
    exact = scores(call).float().softmax(-1).nan_to_num(0.0)
    free = may_meet(call).expand_as(exact)
    count = (free.sum(-1, keepdim=True) * share).round().clamp(min=1)
    rank = exact.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    top = (rank < count) & free
    return float((top & kept).sum() / top.sum()), float((exact * kept).sum() / exact.sum())
