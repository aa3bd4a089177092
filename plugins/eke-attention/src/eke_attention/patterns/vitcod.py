"""ViTCoD: a fixed pattern from the mean attention of the first steps."""

from __future__ import annotations

from typing import Any

import torch
from eke import ArgumentError
from torch import Tensor

from eke_attention.kernels import Call, repeated, scores
from eke_attention.patterns.base import Predicted, adam, may_meet, positive


class AlsoLearns(torch.autograd.Function):
    """Lets a second loss be learned where the first goes through: values pass, and it gets a gradient of 1.

    Under a loss scale (``precision="16-mixed"``) the second loss counts as much less.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.ones((), device=gradient.device)


class ViTCoD(Predicted):
    """A fixed pattern from the model's own mean attention: each query keeps the fewest keys that make up a share of it.

    The first ``collect`` steps keep all pairs and average the attention. Then the pattern is made, and stays. Keys
    that many queries keep are meant to be moved to the front of a row, see :func:`polarize`.

    Args:
        share: Of a query's mean attention that its kept keys make up.
        collect: Training steps in which attention is averaged.
        prefix: Tokens at the front, such as the class token, that all meet and that meet all.
        autoencoder: Squeeze queries and keys over their heads to half as many and back. On the authors' chip that saves
            traffic; anywhere else it adds work.
        lr: Learning rate of the autoencoder, which has an Adam of its own.
        weight: Of its error, beside the loss: that of both lengths of what is lost.
        block: Tokens of a block.

    Source:
        You and others, "ViTCoD", HPCA 2023, https://arxiv.org/abs/2210.09573, sections 4 and 5. Departs: exactly as
        many keys as make up the share, where the authors' code keeps one more; the autoencoder begins as a projection,
        so that it does not scramble a trained model.
    """

    def __init__(
        self,
        share: float = 0.5,
        collect: int = 100,
        prefix: int = 1,
        autoencoder: bool = False,
        lr: float = 1e-3,
        weight: float = 1e-4,
        block: int = 64,
    ) -> None:
        if not 0 < share <= 1 or prefix < 0 or weight < 0:
            raise ArgumentError(
                f"share={share}, prefix={prefix}, weight={weight}: give a share above 0, and 0 or more of the others."
            )
        positive(collect=collect, lr=lr, block=block)
        self.share, self.collect, self.prefix, self.block = share, collect, prefix, block
        self.autoencoder, self.lr, self.weight = autoencoder, lr, weight

    def transform(self, call: Call, layer: dict[str, Any], training: bool) -> Call:
        if not self.autoencoder:
            return call
        call = repeated(call)
        heads = call.query.shape[1]
        if "coder" not in layer:
            own = torch.Generator().manual_seed(heads)
            rows = torch.linalg.qr(torch.randn(heads, -(-heads // 2), generator=own)).Q
            # For queries and keys: how heads are squeezed, and how they come back.
            layer["coder"] = rows.expand(2, 2, *rows.shape).clone()
            layer["moments"], layer["coded"] = torch.zeros(2, *layer["coder"].shape), 0
        coder = layer["coder"].to(call.query.device)
        if training:
            if "leaf" not in layer:  # one for all batches of a step
                layer["leaf"] = coder.detach().requires_grad_()
            coder = layer["leaf"]
        found = []
        for x, (squeeze, back) in zip((call.query, call.key), coder.to(call.query.dtype), strict=True):
            coded = torch.einsum("bhnd,hr,gr->bgnd", x, squeeze, back)
            if training and self.weight:
                coded = AlsoLearns.apply(coded, self.weight * (x - coded).float().norm())
            found.append(coded)
        return call._replace(query=found[0], key=found[1])

    def keeps(self, call: Call, layer: dict[str, Any], training: bool) -> Tensor | None:
        if "pattern" not in layer:
            if training:
                mean = scores(call).float().softmax(-1).nan_to_num(0.0).mean(0)
                if "sum" in layer and layer["sum"].shape != mean.shape:
                    raise ArgumentError(
                        f"ViTCoD averages attention of {tuple(layer['sum'].shape)} (heads, queries, keys), and now it "
                        f"is {tuple(mean.shape)}: its pattern is for rows of one length."
                    )
                layer["sum"] = layer.get("sum", 0) + mean
                layer["now"] = layer.get("now", 0) + 1
            return None
        pattern = layer["pattern"].to(call.query.device)
        if pattern.shape[1:] != (call.query.shape[2], call.key.shape[2]):
            raise ArgumentError(
                f"ViTCoD's pattern is for {tuple(pattern.shape[1:])} queries and keys, and attention is to "
                f"{call.query.shape[2]} and {call.key.shape[2]}."
            )
        return pattern.expand(len(call.query), -1, -1, -1) & may_meet(call)

    def after_step(self, layers: dict[str, dict[str, Any]], steps: int, reduce: Any) -> None:
        for layer in layers.values():
            leaf = layer.pop("leaf", None)
            if leaf is not None and leaf.grad is not None:
                layer["coded"] += 1
                layer["coder"], layer["moments"] = adam(
                    layer["coder"], reduce(leaf.grad).cpu(), layer["moments"], layer["coded"], self.lr
                )
            layer["steps"] = layer.get("steps", 0) + bool(layer.pop("now", 0))
            if "sum" in layer and layer["steps"] >= self.collect:
                layer["pattern"] = covering(reduce(layer.pop("sum")), self.share, self.prefix)


def covering(attention: Tensor, share: float, prefix: int = 0) -> Tensor:
    """For each query the fewest keys whose attention adds up to a share of all; ties go to the earlier key.

    Args:
        attention: (..., queries, keys), not negative.
        share: Of each row's sum.
        prefix: First rows and columns that are kept whole.
    """
    ordered, order = attention.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    chosen = (before < share * ordered.sum(-1, keepdim=True) * (1 - 1e-6)) & (ordered > 0)
    kept = torch.zeros_like(chosen).scatter_(-1, order, chosen)
    kept[..., :prefix, :] = True
    kept[..., :prefix] = True
    return kept


def polarize(kept: Tensor, at_least: float = 0.5) -> tuple[Tensor, int]:
    """An order of tokens in which the keys that many queries keep come first: a dense stripe, and a sparse rest.

    Args:
        kept: (tokens, tokens), bool.
        at_least: Share of the queries that makes a key global.

    Returns:
        The order, (tokens,), int64, and the number of global keys. Attention of rows in this order, under
        ``kept[order][:, order]``, is the same in that order.
    """
    columns = kept.float().mean(-2) >= at_least
    return (~columns).to(torch.uint8).argsort(stable=True), int(columns.sum())
