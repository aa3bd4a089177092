"""Sanger: pairs by their attention at few bits."""

from __future__ import annotations

from typing import Any

from eke import ArgumentError
from torch import Tensor
from torch.nn import functional as F

from eke_attention.kernels import Call, scores
from eke_attention.patterns.base import Predicted, or_best, positive, quantize


class Sanger(Predicted):
    """Keeps pairs whose attention, computed with few bits, exceeds a threshold.

    Queries and keys are divided by their lengths and quantized, with a range that follows the largest number seen; the
    softmax of the product is compared.

    Args:
        threshold: Of the predicted attention: 0.002 for BERT and GPT-2, 0.02 to keep less.
        bits: Of the prediction.
        decay: Of the range, over steps.
        block: Tokens of a block.

    Source:
        Lu, Jin, Bi, Luo, Li, Liu, Liang, "Sanger", MICRO 2021, https://doi.org/10.1145/3466752.3480125, section 3.
        Departs: a query none of whose pairs exceeds the threshold keeps its largest one, where the authors' code adds
        -10000 to all and so keeps all.
    """

    def __init__(self, threshold: float = 2e-3, bits: int = 4, decay: float = 0.9999, block: int = 64) -> None:
        if not 0 <= threshold < 1 or bits < 2 or not 0 <= decay <= 1:
            raise ArgumentError(
                f"threshold={threshold}, bits={bits}, decay={decay}: give [0, 1), 2 or more, and a share."
            )
        positive(block=block)
        self.threshold, self.bits, self.decay, self.block = threshold, bits, decay, block

    def keeps(self, call: Call, layer: dict[str, Any], training: bool) -> Tensor:
        query, key = F.normalize(call.query.float(), dim=-1), F.normalize(call.key.float(), dim=-1)
        for name, x in (("query", query), ("key", key)):
            now = x.abs().amax().clamp(min=1e-12)
            layer.setdefault(name, now)
            if training:
                layer[f"new {name}"] = now
        query = quantize(query, layer["query"].to(query), self.bits)
        key = quantize(key, layer["key"].to(key), self.bits)
        lengths = call.query.float().norm(dim=-1, keepdim=True), call.key.float().norm(dim=-1, keepdim=True)
        predicted = scores(call._replace(query=query * lengths[0], key=key * lengths[1])).softmax(-1)
        return or_best(predicted > self.threshold, predicted, call)

    def after_step(self, layers: dict[str, dict[str, Any]], steps: int, reduce: Any) -> None:
        for layer in layers.values():
            for name in ("query", "key"):
                if (now := layer.pop(f"new {name}", None)) is not None:
                    layer[name] = self.decay * layer[name].to(now) + (1 - self.decay) * reduce(now)
