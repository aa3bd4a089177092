"""Several documents in a row: how they are packed, and that they do not meet."""

from __future__ import annotations

from typing import Any

import torch
from eke import ArgumentError
from torch import Tensor

from eke_attention.kernels import Call, Mod
from eke_attention.patterns.base import Pattern, positive


class Documents(Pattern):
    """Tokens meet within their own document, where several are packed into a row.

    Args:
        separator: Token that ends a document, looked for in the batch's ``input_ids``, or in the batch itself. None
            reads ``document_ids`` from the batch, as :func:`pack` writes them.
        block: Tokens of a block.
    """

    def __init__(self, separator: int | None = None, block: int = 64) -> None:
        positive(block=block)
        self.separator, self.block = separator, block
        self._ids: Tensor | None = None

    def see_batch(self, batch: Any) -> Any:
        if self.separator is None:
            if not hasattr(batch, "keys") or "document_ids" not in batch:
                raise ArgumentError(
                    "Documents() reads document_ids from the batch, which has none. Pack it by pack(...)."
                )
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
            raise ArgumentError(
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
        raise ArgumentError(
            f"pack got sequences of {found[0]} to {found[-1]} tokens. Give 1 to {length}, or longer rows."
        )
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
