"""DOTA: keys by a low-rank score that is trained beside the model."""

from __future__ import annotations

import math
from typing import Any

import torch
from eke import ArgumentError
from torch import Tensor

from eke_attention.kernels import Call
from eke_attention.patterns.base import Predicted, adam, may_meet, positive, quantize


class DOTA(Predicted):
    """Keeps each query's best keys by a low-rank score that is trained beside the model.

    The layer's input goes through a fixed random projection and two small matrices for each head; their product, of few
    bits, predicts the scores. The matrices learn by the squared error, with an Adam of their own: nothing flows into
    the model, and the model's weights and optimizer stay what they are.

    Args:
        keep: Share of the keys that a query keeps.
        rank: Size of the projection over the size of a head.
        bits: Of the prediction.
        lr: Learning rate of the matrices.
        calibrate: Training steps in which they learn and all pairs are kept.
        block: Tokens of a block.

    Source:
        Qu, Liu, Tu, Chen, Ding, Xie, "DOTA", ASPLOS 2022, https://doi.org/10.1145/3503222.3507738. Departs: the paper
        adds the error to the loss; with the model cut off, an optimizer of its own does the same.
    """

    wants_input = True

    def __init__(
        self,
        keep: float = 0.1,
        rank: float = 0.2,
        bits: int = 4,
        lr: float = 1e-2,
        calibrate: int = 100,
        block: int = 64,
    ) -> None:
        if not 0 < keep <= 1 or bits < 2:
            raise ArgumentError(f"keep={keep}, bits={bits}: give a share of the keys above 0, and 2 bits or more.")
        positive(rank=rank, lr=lr, calibrate=calibrate, block=block)
        self.keep, self.rank, self.bits, self.lr, self.calibrate, self.block = keep, rank, bits, lr, calibrate, block

    def keeps(self, call: Call, layer: dict[str, Any], training: bool) -> Tensor | None:
        if "input" not in layer:
            raise ArgumentError(
                "DOTA predicts from what attention is given, (batch, length, width), and found no such tensor."
            )
        x = layer.pop("input").float()
        heads, size, device = call.query.shape[1], call.query.shape[-1], x.device
        if "random" not in layer:
            own, rank = torch.Generator().manual_seed(x.shape[-1]), max(1, round(self.rank * size))
            draws = torch.rand(x.shape[-1], rank, generator=own)
            layer["random"] = math.sqrt(3 / rank) * ((draws < 1 / 6).float() - (draws > 5 / 6).float())
            start = torch.randn(2, heads, rank, rank, generator=own) / rank
            layer["matrices"], layer["moments"], layer["steps"] = start, torch.zeros(2, *start.shape), 0
        small = (x @ layer["random"].to(device))[:, None]
        matrices = layer["matrices"].to(device)
        if training:
            layer["gradient"] = self._gradient(small, matrices, call)
            if layer["steps"] < self.calibrate:
                return None
        elif layer["steps"] < self.calibrate:
            return None
        both = small @ matrices[:, None]
        query, key = (quantize(part, part.abs().amax().clamp(min=1e-12), self.bits) for part in both)
        predicted = (query @ key.transpose(-1, -2)).masked_fill(~may_meet(call), -torch.inf)
        count = max(1, round(self.keep * call.key.shape[2]))
        kept = torch.zeros_like(predicted, dtype=torch.bool)
        kept.scatter_(-1, predicted.topk(count, dim=-1).indices, True)
        return kept & may_meet(call)

    def _gradient(self, small: Tensor, matrices: Tensor, call: Call) -> Tensor:
        free = may_meet(call)
        wanted = (call.query.float() @ call.key.float().transpose(-1, -2) * call.factor).detach()
        with torch.enable_grad(), torch.autocast(small.device.type, enabled=False):
            own = matrices.detach().requires_grad_()
            query, key = small @ own[:, None]
            error = ((query @ key.transpose(-1, -2) - wanted) ** 2 * free).sum() / free.expand_as(wanted).sum()
            return torch.autograd.grad(error, own)[0]

    def after_step(self, layers: dict[str, dict[str, Any]], steps: int, reduce: Any) -> None:
        for layer in layers.values():
            if "gradient" not in layer:
                continue
            gradient = reduce(layer.pop("gradient")).cpu()
            layer["steps"] += 1
            layer["matrices"], layer["moments"] = adam(
                layer["matrices"], gradient, layer["moments"], layer["steps"], self.lr
            )
