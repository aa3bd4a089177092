"""A3: keys by a greedy search over columns."""

from __future__ import annotations

import math
from typing import Any

import torch
from eke import ArgumentError
from torch import Tensor

from eke_attention.kernels import Call, scores
from eke_attention.patterns.base import Predicted, may_meet, or_best, positive


class A3(Predicted):
    """Keeps keys that a greedy search of the largest products finds, and of those what is not far below the best.

    Args:
        share: Steps of the search over the number of keys: 1/2 is the authors' conservative choice, 1/8 the aggressive
            one.
        percent: Keys whose attention is below this percentage of the best one's are left out: 5, or 10.
        block: Tokens of a block.

    Source:
        Ham and others, "A3", HPCA 2020, https://arxiv.org/abs/2002.10941, section 4.
    """

    def __init__(self, share: float = 0.5, percent: float = 5.0, block: int = 64) -> None:
        if not 0 < share <= 1 or not 0 < percent <= 100:
            raise ArgumentError(f"share={share}, percent={percent}: give a share above 0 and a percentage above 0.")
        positive(block=block)
        self.share, self.percent, self.block = share, percent, block

    def keeps(self, call: Call, layer: dict[str, Any], training: bool) -> Tensor:
        query, key = call.query.float(), call.key.float()
        found = greedy_scores(query, key, max(1, round(self.share * key.shape[2])))
        exact = scores(call).float()
        candidates = (found > 0) & may_meet(call)
        best = exact.masked_fill(~candidates, -torch.inf).amax(-1, keepdim=True)
        return or_best(candidates & (exact >= best - math.log(100 / self.percent)), exact, call)


def greedy_scores(query: Tensor, key: Tensor, steps: int) -> Tensor:
    """A3's search: for each query add up the largest products of single columns, and the most negative ones.

    A step takes the largest product that is left over all columns and adds it to its key, if positive; and then, if
    all that was added is not below 0, the smallest one, if negative.

    Args:
        query, key: (..., queries, size) and (..., keys, size), float32.
        steps: At most the keys.

    Returns:
        (..., queries, keys).
    """
    shape = query.shape[:-1]
    order = key.argsort(dim=-2)  # (..., keys, size), of each column rising
    ordered, keys = key.gather(-2, order), key.shape[-2]
    total = query.new_zeros(shape)
    found = query.new_zeros(*shape, keys)
    taken = {True: torch.zeros_like(query, dtype=torch.int64), False: torch.zeros_like(query, dtype=torch.int64)}

    def pop(largest: bool, does: Tensor) -> None:
        nonlocal total
        count = taken[largest].clamp(max=keys - 1)
        at = torch.where((query >= 0) == largest, keys - 1 - count, count)  # (..., queries, size)
        products = ordered.gather(-2, at) * query
        products = products.masked_fill(taken[largest] >= keys, -torch.inf if largest else torch.inf)
        value, column = products.max(-1) if largest else products.min(-1)
        row = order.gather(-2, at).gather(-1, column[..., None])
        added = torch.where(does & ((value > 0) if largest else (value < 0)), value, 0.0)
        found.scatter_add_(-1, row, added[..., None])
        total = total + added
        taken[largest].scatter_add_(-1, column[..., None], does[..., None].long())

    for _ in range(steps):
        pop(True, torch.ones_like(total, dtype=torch.bool))
        pop(False, total >= 0)
    return found
