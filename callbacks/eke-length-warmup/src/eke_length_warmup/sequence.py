"""Which parts of a batch are its sequence, and which window of each row a short step sees.

Sizes do not tell: images of 32 pixels, 32 labels of a sample and 32 features stand beside texts of 32 tokens. A part
counts as sequence by its name, or because it says the same as the token ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from eke import EkeError, compat
from eke.seams import batch as batches
from torch import Tensor

IGNORED = -100  # the label that torch's cross entropy leaves out

_LABELS = re.compile(r"label|target|class|^y$|^decoder", re.IGNORECASE)
_NO_IDS = re.compile(r"label|target|class|^y$|mask|type|position|segment", re.IGNORECASE)
_PER_TOKEN = re.compile(r"mask|(^|_)ids?$|tokens?$|segment", re.IGNORECASE)
_FEATURES = re.compile(r"embed|hidden", re.IGNORECASE)
_LOSS_MASK = re.compile(r"(loss|completion|assistant).*mask", re.IGNORECASE)
_SPANS = (("start_positions", "end_positions"),)  # names of question answering: places in the sequence


class SequenceError(EkeError, ValueError):
    """Which part of a batch is the sequence is not known, or it cannot be shortened."""


@dataclass
class Sequences:
    """What of a batch goes by token.

    Attributes:
        ids: The token ids, (batch, length).
        parts: By ``id`` of the tensor: ``"tokens"`` for (batch or 1, length, ...), ``"pairs"`` where its last two
            dimensions are tokens.
        attended: Where there is text, (batch, length), or None if the batch does not say.
        targets: Where there is something to predict, (batch, length), or None if the batch does not say.
        spans: Pairs of places in the sequence, (batch,) each: first and last token of an answer.
        left: Names of parts that have as many entries as the sequence and are not known to go by token.
    """

    ids: Tensor
    parts: dict[int, Literal["tokens", "pairs"]]
    attended: Tensor | None
    targets: Tensor | None
    spans: list[tuple[Tensor, Tensor]]
    left: list[str]

    @property
    def length(self) -> int:
        return self.ids.shape[1]


def find_sequences(batch: Any, wanted: Sequence[str | int] | None = None) -> Sequences:
    """Find what of a batch is its sequence.

    The token ids are what is called ``input_ids``, else the first whole numbers of shape (batch, length). With them go
    parts of the same two sizes whose name says so (``attention_mask``, ``token_type_ids``, ``inputs_embeds``), bool
    ones, labels with ``-100`` among them or equal to the ids but for a shift by one, and a mask of 0 and 1 that is 0
    at one id alone. Attention masks of pairs go by their name. Everything else stays whole.

    Args:
        batch: In whatever containers.
        wanted: Names or places of the parts that are sequences, such as ``["input_ids", "labels"]`` or ``[0, 1]``;
            dotted in nested containers. All others stay whole.

    Raises:
        SequenceError: there are no token ids, or of several lengths; no part of a wanted name.
    """
    named = [(path, tensor) for path, tensor in _named(batch)]
    if wanted is not None:
        taken = _asked_for(named, wanted)
        ids = next((one for _, one in taken if not one.is_floating_point()), taken[0][1])
        taken_ids = {id(one) for _, one in taken}
    else:
        ids, taken_ids = _ids(named), None
    found = Sequences(ids, {}, None, None, [], [])
    targets = []
    for path, tensor in named:
        name = path[-1] if path and isinstance(path[-1], str) else ""
        if taken_ids is None:
            kind = _kind(name, tensor, ids)
        else:
            kind = (_pairs(name or "mask", tensor, ids) or "tokens") if id(tensor) in taken_ids else None
        if kind is None:
            if tensor.ndim > 1 and tensor.shape[:2] == ids.shape:
                found.left.append(".".join(map(str, path)))
            continue
        found.parts[id(tensor)] = kind
        if kind == "pairs" or tensor.shape != ids.shape or tensor is ids:
            continue
        if name == "attention_mask" or (not name and _is_mask(tensor, ids)):
            found.attended = tensor != 0
        elif _LOSS_MASK.search(name):
            targets.append(tensor != 0)
        elif not tensor.is_floating_point() and tensor.dtype != torch.bool and _ignores(tensor):
            targets.append(tensor != IGNORED)
    if targets:
        found.targets = torch.stack(targets).all(0)
    by_name = {path[-1]: tensor for path, tensor in named if path}
    for first, last in _SPANS:
        if first in by_name and last in by_name and by_name[first].numel() == len(ids):
            found.spans.append((by_name[first], by_name[last]))
    return found


def windows(found: Sequences, length: int) -> Tensor:
    """Where the window of ``length`` tokens begins in each row, (batch,), int64.

    At the first token of the text, behind padding on its left. Where no target lay in the window, or none behind its
    first token, from which models that predict the next one cannot be asked for it, the window moves on until the first
    target is in its middle; an answer that it would cut moves it to the answer.
    """
    ids, last = found.ids, found.length - length
    start = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    if found.attended is not None:
        start = found.attended.long().argmax(1).clamp(max=last)
    places = torch.arange(found.length, device=ids.device)
    if found.targets is not None:
        behind = found.targets & (places > start[:, None])
        first = behind.long().argmax(1)
        beyond = behind.any(1) & (first >= start + length)
        start = torch.where(beyond, (first - length // 2).clamp(max=last), start)
    for one, other in found.spans:
        first, final = one.reshape(-1), other.reshape(-1)
        asked = (first >= 0) & (first < found.length)
        cut = asked & ((first < start) | (final >= start + length))
        room = (length - (final - first + 1)).clamp(min=0) // 2
        start = torch.where(cut, (first - room).clamp(min=0, max=last), start)
    return start


def shorten(batch: Any, length: int, sequence: Sequence[str | int] | None = None) -> Any:
    """Cut every sequence of a batch, in whatever container, to a window of ``length`` tokens, see :func:`windows`."""
    return cut(batch, find_sequences(batch, sequence), length)


def cut(batch: Any, found: Sequences, length: int) -> Any:
    """:func:`shorten` for sequences that were found already."""
    start = windows(found, length)
    place = start[:, None] + torch.arange(length, device=start.device)  # (batch, length)
    new: dict[int, Tensor] = {}
    for tensor in batches.tensors(batch):
        kind = found.parts.get(id(tensor))
        if kind == "pairs" and tensor.ndim == 2:  # one for all rows
            new[id(tensor)] = tensor[:length, :length].contiguous()
        elif kind == "pairs":
            new[id(tensor)] = _gather(_gather(_of_batch(tensor, len(start)), place, -2), place, -1)
        elif kind == "tokens" and tensor.shape[1] == found.length:
            new[id(tensor)] = _gather(_of_batch(tensor, len(start)), place, 1)
        elif kind == "tokens":  # asked for, and of another length
            new[id(tensor)] = tensor[:, :length].contiguous()
    for one, other in found.spans:
        for places in (one, other):
            new[id(places)] = places - start.view(places.shape).to(places.dtype)
    return batches.mapped(batch, lambda tensor: new.get(id(tensor), tensor))


def row_length(length: int, full: int) -> int:
    """Length of the rows when sequences of ``full`` tokens are split evenly into the fewest of ``length`` at most."""
    return full // -(-full // length)


def split(batch: Any, length: int, sequence: Sequence[str | int] | None = None) -> Any:
    """Split every sequence into rows of one length, that of the fewest with at most ``length`` tokens.

    Fewer tokens than there are rows are left out, at the end. Rows without text or without a target are left out too.

    Raises:
        SequenceError: a part has one entry a sample, or an attention mask of pairs: neither can be split.
    """
    return divide(batch, find_sequences(batch, sequence), length)


def divide(batch: Any, found: Sequences, length: int) -> Any:
    """:func:`split` for sequences that were found already."""
    size, samples = row_length(length, found.length), len(found.ids)
    rows = found.length // size
    for path, tensor in _named(batch):
        per_token = found.parts.get(id(tensor)) == "tokens" and tensor.shape[1] == found.length
        if tensor.ndim and not per_token:
            raise SequenceError(
                f"LengthWarmup(mode='reshape') makes several sequences of one, and the batch has a tensor of shape "
                f"{tuple(tensor.shape)} ({'.'.join(map(str, path)) or 'itself'}), which is not known to be one entry a "
                "token. Use mode='truncate', or name what goes by token: sequence=[...]."
            )

    def rows_of(tensor: Tensor) -> Tensor:
        tensor = _of_batch(tensor, samples)[:, : rows * size]
        return tensor.reshape(samples * rows, size, *tensor.shape[2:])

    kept = torch.ones(samples * rows, dtype=torch.bool, device=found.ids.device)
    if found.attended is not None:
        kept &= rows_of(found.attended).any(1)
    if found.targets is not None:
        kept &= rows_of(found.targets)[:, 1:].any(1)
    every = not compat.has_values(kept) or bool(kept.all()) or not bool(kept.any())
    return batches.mapped(batch, lambda one: one if not one.ndim else rows_of(one) if every else rows_of(one)[kept])


def _named(batch: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Tensor]]:
    """Every tensor with its names and places, in the order of :func:`eke.seams.batch.tensors`."""
    if isinstance(batch, Tensor):
        yield path, batch
    elif (parts := batches.named_parts(batch)) is not None:
        for name, part in parts.items():
            yield from _named(part, (*path, str(name)))
    elif isinstance(batch, tuple) and hasattr(batch, "_fields"):
        for name, part in zip(batch._fields, batch, strict=True):
            yield from _named(part, (*path, name))
    elif isinstance(batch, (list, tuple)):
        for place, part in enumerate(batch):
            yield from _named(part, (*path, place))


def _asked_for(named: list[Any], wanted: Sequence[str | int]) -> list[Any]:
    taken = []
    for one in wanted:
        fitting = [
            (path, tensor) for path, tensor in named if str(one) in (".".join(map(str, path)), str(path[-1:][0]))
        ]
        if not fitting or any(tensor.ndim < 2 for _, tensor in fitting):
            raise SequenceError(
                f"sequence={list(wanted)!r} names {one!r}, and the batch has {_shapes(named)}. Name parts of shape "
                "(batch, length, ...)."
            )
        taken += fitting
    return taken


def _ids(named: list[Any]) -> Tensor:
    whole = [(path, one) for path, one in named if one.ndim == 2 and _is_whole(one)]
    called = [one for path, one in whole if path and path[-1] == "input_ids"]
    candidates = called or [one for path, one in whole if not (path and _NO_IDS.search(str(path[-1])))]
    lengths = {one.shape[1] for one in candidates}
    if not lengths:
        raise SequenceError(
            f"LengthWarmup found no token ids, whole numbers of shape (batch, length), in a batch of {_shapes(named)}. "
            "Leave it out here: it shortens texts."
        )
    if len(lengths) > 1:
        alike = [path for path, one in named if one.shape[:2] == candidates[0].shape]
        fitting = [path[0] if len(path) == 1 else ".".join(map(str, path)) for path in alike]
        raise SequenceError(
            f"LengthWarmup found token ids of several lengths in a batch of {_shapes(named)}. Name those that are to "
            f"be shortened, all of one length: LengthWarmup(sequence={fitting!r})."
        )
    return candidates[0]


def _kind(name: str, tensor: Tensor, ids: Tensor) -> Literal["tokens", "pairs"] | None:
    if tensor is ids:
        return "tokens"
    if pairs := _pairs(name, tensor, ids):
        return pairs
    if tensor.ndim < 2 or tensor.shape[1] != ids.shape[1] or tensor.shape[0] not in (1, len(ids)):
        return None
    if _LABELS.search(name):
        known = _is_whole(tensor) and tensor.ndim == 2 and _says_the_same(tensor, ids)
    elif tensor.ndim > 2:
        known = bool(_FEATURES.search(name))
    elif tensor.is_floating_point():
        known = "mask" in name.lower()
    elif _PER_TOKEN.search(name) or tensor.dtype == torch.bool:
        known = True
    else:
        known = _says_the_same(tensor, ids) or _is_mask(tensor, ids)
    return "tokens" if known else None


def _pairs(name: str, tensor: Tensor, ids: Tensor) -> Literal["pairs"] | None:
    """An attention mask of pairs, (..., length, length): by its name, or bool and of four dimensions."""
    square = tensor.ndim > 1 and tensor.shape[-2:] == (ids.shape[1], ids.shape[1])
    called = "mask" in name.lower() and (tensor.ndim > 2 or tensor.shape[0] != len(ids))
    return "pairs" if square and (called or (tensor.ndim == 4 and tensor.dtype == torch.bool)) else None


def _is_whole(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and tensor.dtype != torch.bool


def _ignores(labels: Tensor) -> bool:
    """Some labels do not count."""
    return compat.has_values(labels) and bool((labels == IGNORED).any())


def _says_the_same(labels: Tensor, ids: Tensor) -> bool:
    """Labels of tokens, beyond doubt: some are ignored, or they are the ids, or those one place on or back."""
    if labels.shape != ids.shape:
        return False
    if not compat.has_values(labels):  # a dry run, which asks for sizes
        return True
    if _ignores(labels):
        return True
    pairs = ((labels, ids), (labels[:, :-1], ids[:, 1:]), (labels[:, 1:], ids[:, :-1]))
    return any(one.numel() > 0 and torch.equal(one, other) for one, other in pairs)


def _is_mask(tensor: Tensor, ids: Tensor) -> bool:
    """0 and 1, with 0 at one id alone: the padding's."""
    if tensor.shape != ids.shape or tensor.is_floating_point():
        return False
    if not compat.has_values(tensor):
        return True
    out = ids[tensor == 0]
    return bool(((tensor == 0) | (tensor == 1)).all()) and bool((out == out[:1]).all())


def _of_batch(tensor: Tensor, samples: int) -> Tensor:
    """One row for each sample, of what the batch has once for all of them."""
    return tensor.expand(samples, *tensor.shape[1:]) if tensor.shape[0] == 1 else tensor


def _gather(tensor: Tensor, place: Tensor, dim: int) -> Tensor:
    dim %= tensor.ndim
    index = place.view(len(place), *(place.shape[1] if at == dim else 1 for at in range(1, tensor.ndim)))
    sizes = [place.shape[1] if at == dim else size for at, size in enumerate(tensor.shape)]
    return tensor.gather(dim, index.expand(sizes))


def _shapes(named: list[Any]) -> str:
    found = [
        f"{'.'.join(map(str, path)) + ' ' if path and isinstance(path[-1], str) else ''}"
        f"{tuple(one.shape)} {str(one.dtype).removeprefix('torch.')}"
        for path, one in named
    ]
    return ", ".join(found) or "no tensors"
