"""ELSA: keys by the sign bits of a random rotation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eke_attention.kernels import Call, scores
from eke_attention.patterns.base import Predicted, may_meet, or_best, positive


class ELSA(Predicted):
    """Keeps keys that are near a query by the sign bits of a random rotation.

    The angle between query and key is estimated by how many signs differ. A key is kept where its length times the
    cosine exceeds a layer's threshold times the longest key; the threshold is learned in the first ``calibrate``
    steps, which keep all pairs.

    Args:
        strictness: ``p``: a pair counts while thresholds are learned if its attention exceeds p over the length.
        calibrate: Training steps in which thresholds are learned.
        block: Tokens of a block.

    Source:
        Ham and others, "ELSA", ISCA 2021, https://doi.org/10.1109/ISCA52012.2021.00060, sections 3 and 4. Departs: the
        rotation is a dense orthogonal matrix, where the chip multiplies by three small ones.
    """

    def __init__(self, strictness: float = 1.0, calibrate: int = 10, block: int = 64) -> None:
        positive(strictness=strictness, calibrate=calibrate, block=block)
        self.strictness, self.calibrate, self.block = strictness, calibrate, block
        self._rotations: dict[int, tuple[Tensor, float]] = {}

    def rotation(self, size: int) -> tuple[Tensor, float]:
        """An orthogonal matrix, and how much angles are estimated too large: the 80th percentile."""
        if size not in self._rotations:
            own = torch.Generator().manual_seed(size)
            matrix = torch.linalg.qr(torch.randn(size, size, generator=own)).Q
            one, other = (F.normalize(torch.randn(20_000, size, generator=own), dim=-1) for _ in range(2))
            exact = (one * other).sum(-1).clamp(-1, 1).acos()
            estimated = ((one @ matrix > 0) != (other @ matrix > 0)).float().mean(-1) * math.pi
            self._rotations[size] = matrix, float((estimated - exact).quantile(0.8))
        return self._rotations[size]

    def keeps(self, call: Call, layer: dict[str, Any], training: bool) -> Tensor | None:
        query, key = call.query.float(), call.key.float()
        longest = key.norm(dim=-1).amax(-1)[..., None, None]
        if layer.get("steps", 0) < self.calibrate:
            if training:
                layer["new"] = self._smallest(call, longest)
            return None
        matrix, bias = self.rotation(query.shape[-1])
        signs = [torch.where(x @ matrix.to(x) > 0, 1.0, -1.0) for x in (query, key)]
        share = 0.5 - signs[0] @ signs[1].transpose(-1, -2) / (2 * query.shape[-1])  # of the signs that differ
        cosine = (math.pi * share - bias).clamp(min=0).cos()
        estimated = cosine * key.norm(dim=-1)[..., None, :]
        return or_best(estimated > layer["threshold"].to(longest) * longest, estimated, call)

    def _smallest(self, call: Call, longest: Tensor) -> Tensor:
        """Of the close pairs of each query, the smallest score over its lengths; the mean over queries."""
        attention = scores(call).float().softmax(-1)
        free = may_meet(call).expand_as(attention)
        close = (attention > self.strictness / free.sum(-1, keepdim=True)) & free
        products = call.query.float() @ call.key.float().transpose(-1, -2)
        relative = products / (call.query.float().norm(dim=-1, keepdim=True) * longest).clamp(min=1e-12)
        smallest = relative.masked_fill(~close, torch.inf).amin(-1)
        return smallest[smallest.isfinite()].mean()

    def after_step(self, layers: dict[str, dict[str, Any]], steps: int, reduce: Any) -> None:
        for layer in layers.values():
            if (new := layer.pop("new", None)) is not None and bool((new := reduce(new)).isfinite()):
                count = layer.get("steps", 0)
                before = layer.get("threshold", torch.zeros_like(new)).to(new)
                layer["threshold"], layer["steps"] = (before * count + new) / (count + 1), count + 1
