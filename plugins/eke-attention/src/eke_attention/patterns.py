"""Which pairs of tokens meet: fixed patterns, documents packed into one row, and what a cheap prediction keeps.

A pattern gives a function of batch, head, query and key (numbers, as tensors) that says whether the two meet. Sources
of the predictions stand at each of them. Survey section 4.
"""

from __future__ import annotations

import math
from typing import Any

import torch
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


def _positive(**given: float) -> None:
    for name, value in given.items():
        if value <= 0:
            raise ValueError(f"{name}={value}: give a number above 0.")


class SlidingWindow(Pattern):
    """Each token meets those up to ``size`` away, and the first ``sinks`` of a row.

    Args:
        size: Tokens to either side; in causal attention, before it.
        sinks: Tokens at the beginning that all meet.
        block: Tokens of a block.
    """

    fixed = True

    def __init__(self, size: int, sinks: int = 0, block: int = 64) -> None:
        _positive(size=size, block=block)
        self.size, self.sinks, self.block = size, sinks, block

    def mod(self, call: Call, layer: dict[str, Any], training: bool) -> Mod:
        return lambda b, h, q, k: ((q - k).abs() <= self.size) | (k < self.sinks)


class Prefix(Pattern):
    """The first ``length`` tokens meet each other in both directions, the others those before them.

    For models without a causal mask of their own, which would forbid it again.

    Args:
        length: Tokens of the prefix.
        block: Tokens of a block.
    """

    fixed = True

    def __init__(self, length: int, block: int = 64) -> None:
        _positive(length=length, block=block)
        self.length, self.block = length, block

    def mod(self, call: Call, layer: dict[str, Any], training: bool) -> Mod:
        return lambda b, h, q, k: (k <= q) | (k < self.length)


class Documents(Pattern):
    """Tokens meet within their own document, where several are packed into a row.

    Args:
        separator: Token that ends a document, looked for in the batch's ``input_ids``, or in the batch itself. None
            reads ``document_ids`` from the batch, as :func:`pack` writes them.
        block: Tokens of a block.
    """

    def __init__(self, separator: int | None = None, block: int = 64) -> None:
        _positive(block=block)
        self.separator, self.block = separator, block
        self._ids: Tensor | None = None

    def see_batch(self, batch: Any) -> Any:
        if self.separator is None:
            if not hasattr(batch, "keys") or "document_ids" not in batch:
                raise ValueError("Documents() reads document_ids from the batch, which has none. Pack it by pack(...).")
            self._ids = batch["document_ids"]
            # The model does not know them.
            return type(batch)({name: part for name, part in batch.items() if name != "document_ids"})
        tokens = batch["input_ids"] if hasattr(batch, "keys") else batch
        tokens = tokens[0] if isinstance(tokens, (list, tuple)) else tokens
        ends = tokens == self.separator
        self._ids = ends.cumsum(1) - ends.long()  # a separator belongs to what it ends
        return batch

    def mod(self, call: Call, layer: dict[str, Any], training: bool) -> Mod:
        ids, length = self._ids, call.query.shape[2]
        if ids is None or len(ids) != len(call.query) or ids.shape[1] < length or call.key.shape[2] != length:
            shape = None if ids is None else tuple(ids.shape)
            raise ValueError(
                f"Documents knows documents of shape {shape}, and attention is to {tuple(call.query.shape)} "
                "(batch, heads, length, size): it serves self-attention over the tokens of the batch."
            )
        return lambda b, h, q, k: ids[b, q] == ids[b, k]


def pack(sequences: list[Tensor], length: int, padding: int = 0) -> dict[str, Tensor]:
    """Put token sequences one behind the other into rows: first fit, the longest first.

    Args:
        sequences: Each (tokens,), int64, at most ``length`` long.
        length: Of a row.
        padding: Token of what is left over.

    Returns:
        ``input_ids``, ``labels`` (-100 for padding and for the first token of a document, which nothing precedes),
        ``position_ids`` that begin anew with each document, and ``document_ids``, each (rows, length), int64.

    Raises:
        ValueError: a sequence is empty, or longer than a row.
    """
    if any(not 0 < len(one) <= length for one in sequences):
        found = sorted({len(one) for one in sequences})
        raise ValueError(f"pack got sequences of {found[0]} to {found[-1]} tokens. Give 1 to {length}, or longer rows.")
    rows: list[list[Tensor]] = []
    for one in sorted(sequences, key=len, reverse=True):
        home = next((row for row in rows if sum(map(len, row)) + len(one) <= length), None)
        if home is None:
            rows.append(home := [])
        home.append(one)
    shape = len(rows), length
    packed = {
        "input_ids": torch.full(shape, padding),
        "labels": torch.full(shape, -100),
        "position_ids": torch.zeros(shape, dtype=torch.int64),
        "document_ids": torch.full(shape, -1),
    }
    for number, row in enumerate(rows):
        at = 0
        for document, one in enumerate(row):
            place = slice(at, at + len(one))
            packed["input_ids"][number, place] = one
            packed["labels"][number, at + 1 : at + len(one)] = one[1:]
            packed["position_ids"][number, place] = torch.arange(len(one))
            packed["document_ids"][number, place] = document
            at += len(one)
    return packed


# ---------------------------------------------------------------------- predicted sparsity


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


def quantize(x: Tensor, largest: Tensor, bits: int = 4) -> Tensor:
    """Symmetric quantization to ``2 ** bits - 1`` levels up to ``largest``, as float."""
    levels = 2 ** (bits - 1) - 1
    return (x * levels / largest).round().clamp(-levels, levels) * largest / levels


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
            raise ValueError(f"threshold={threshold}, bits={bits}, decay={decay}: give [0, 1), 2 or more, and a share.")
        _positive(block=block)
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
        return _or_best(predicted > self.threshold, predicted, call)

    def after_step(self, layers: dict[str, dict[str, Any]], steps: int, reduce: Any) -> None:
        for layer in layers.values():
            for name in ("query", "key"):
                if (now := layer.pop(f"new {name}", None)) is not None:
                    layer[name] = self.decay * layer[name].to(now) + (1 - self.decay) * reduce(now)


def _or_best(kept: Tensor, predicted: Tensor, call: Call) -> Tensor:
    """Of those that may meet; a query that keeps nothing keeps its best."""
    free = may_meet(call)
    best = F.one_hot(predicted.nan_to_num(-1.0).argmax(-1), predicted.shape[-1]).bool()
    kept = kept & free
    return kept | (best & free & ~kept.any(-1, keepdim=True))


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
        _positive(strictness=strictness, calibrate=calibrate, block=block)
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
        return _or_best(estimated > layer["threshold"].to(longest) * longest, estimated, call)

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
            raise ValueError(f"share={share}, percent={percent}: give a share above 0 and a percentage above 0.")
        _positive(block=block)
        self.share, self.percent, self.block = share, percent, block

    def keeps(self, call: Call, layer: dict[str, Any], training: bool) -> Tensor:
        query, key = call.query.float(), call.key.float()
        found = greedy_scores(query, key, max(1, round(self.share * key.shape[2])))
        exact = scores(call).float()
        candidates = (found > 0) & may_meet(call)
        best = exact.masked_fill(~candidates, -torch.inf).amax(-1, keepdim=True)
        return _or_best(candidates & (exact >= best - math.log(100 / self.percent)), exact, call)


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
            raise ValueError(f"keep={keep}, bits={bits}: give a share of the keys above 0, and 2 bits or more.")
        _positive(rank=rank, lr=lr, calibrate=calibrate, block=block)
        self.keep, self.rank, self.bits, self.lr, self.calibrate, self.block = keep, rank, bits, lr, calibrate, block

    def keeps(self, call: Call, layer: dict[str, Any], training: bool) -> Tensor | None:
        if "input" not in layer:
            raise ValueError(
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


def adam(x: Tensor, gradient: Tensor, moments: Tensor, steps: int, lr: float) -> tuple[Tensor, Tensor]:
    """One step of Adam, the ``steps``-th, for what a pattern learns beside the model: the new values and moments."""
    first = 0.9 * moments[0] + 0.1 * gradient
    second = 0.999 * moments[1] + 0.001 * gradient**2
    change = first / (1 - 0.9**steps) / ((second / (1 - 0.999**steps)).sqrt() + 1e-8)
    return x - lr * change, torch.stack([first, second])


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
            raise ValueError(
                f"share={share}, prefix={prefix}, weight={weight}: give a share above 0, and 0 or more of the others."
            )
        _positive(collect=collect, lr=lr, block=block)
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
                    raise ValueError(
                        f"ViTCoD averages attention of {tuple(layer['sum'].shape)} (heads, queries, keys), and now it "
                        f"is {tuple(mean.shape)}: its pattern is for rows of one length."
                    )
                layer["sum"] = layer.get("sum", 0) + mean
                layer["now"] = layer.get("now", 0) + 1
            return None
        pattern = layer["pattern"].to(call.query.device)
        if pattern.shape[1:] != (call.query.shape[2], call.key.shape[2]):
            raise ValueError(
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


def pairs(pattern: Pattern, call: Call, layer: dict[str, Any], training: bool = False) -> Tensor:
    """The pattern of a call pair by pair, the model's own mask in it, (batch, heads, queries, keys), bool."""
    mod = pattern.mod(call, layer, training)
    batch, heads, queries, _ = call.query.shape
    free = may_meet(call).expand(batch, heads, queries, call.key.shape[2])
    return free if mod is None else free & grid(mod, batch, heads, queries, call.key.shape[2], call.query.device)
