"""Which tokens are hidden and by what. Tensors are (batch, length); every draw is from the generator that is given."""

from __future__ import annotations

import math

import torch
from torch import Tensor

IGNORED = -100  # the label that torch's cross entropy leaves out


def budget(candidates: Tensor, share: float) -> Tensor:
    """How many tokens of each sequence are hidden, (batch,): ``round(share * candidates)``, one at least where there
    is a candidate.

    Source:
        Devlin et al. 2019, the authors' ``create_pretraining_data``.
    """
    count = candidates.sum(1)
    return (count * share).round().long().clamp(min=1).minimum(count)


def choose_tokens(candidates: Tensor, share: float, numbers: torch.Generator) -> Tensor:
    """Hide single tokens, uniformly among the candidates: bool, exactly :func:`budget` of each sequence."""
    noise = torch.rand(candidates.shape, generator=numbers, device=candidates.device).masked_fill(~candidates, 2.0)
    return (noise.argsort(1).argsort(1) < budget(candidates, share)[:, None]) & candidates


def choose_words(candidates: Tensor, words: Tensor, share: float, numbers: torch.Generator) -> Tensor:
    """Hide whole words, in random order, until the budget is spent; a word that would exceed it is passed over.

    Where none fits, the first of the shortest is hidden all the same.

    Args:
        candidates: bool.
        words: int64, rising in each sequence: the number of the word that a token belongs to.

    Source:
        Whole word masking of the BERT authors' code.
    """
    batch, length = candidates.shape
    most = int(words.max()) + 1
    sizes = torch.zeros(batch, most, dtype=torch.long, device=words.device).scatter_add(1, words, candidates.long())
    noise = torch.rand(batch, most, generator=numbers, device=words.device).masked_fill(sizes == 0, 2.0)
    order, left = noise.argsort(1), budget(candidates, share)
    chosen = torch.zeros(batch, most, dtype=torch.bool, device=words.device)
    for rank in range(most):
        word = order[:, rank : rank + 1]
        size = sizes.gather(1, word)[:, 0]
        fits = (size > 0) & (size <= left)
        chosen.scatter_(1, word, fits[:, None])
        left = left - size * fits
    shortest = (sizes.masked_fill(sizes == 0, candidates.shape[1] + 1) + noise).argmin(1, keepdim=True)
    none = (~chosen.any(1, keepdim=True)) & candidates.any(1, keepdim=True)
    chosen |= torch.zeros_like(chosen).scatter_(1, shortest, none)
    return chosen.gather(1, words) & candidates


def span_lengths(count: int, numbers: torch.Generator, longest: int = 10, geometric: float = 0.2) -> Tensor:
    """Lengths of spans, (count,), int64: geometric from 1 on, given that they are at most ``longest``.

    ``P(length = n)`` is ``p (1 - p)^(n - 1) / (1 - (1 - p)^longest)`` for p = ``geometric``: with 0.2 and 10 the mean
    is 3.80.

    Source:
        Joshi et al. 2020 (SpanBERT), section 3.1, and the authors' ``PairWithSpanMaskingScheme``.
    """
    stay = 1 - geometric
    draw = torch.rand(count, generator=numbers, device=numbers.device, dtype=torch.float64) * (1 - stay**longest)
    return ((torch.log1p(-draw) / math.log(stay)).floor().long() + 1).clamp(max=longest)


def choose_spans(
    candidates: Tensor,
    share: float,
    numbers: torch.Generator,
    longest: int = 10,
    geometric: float = 0.2,
    words: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Hide spans of whole words until the budget is spent; the last span is cut to what the budget leaves.

    A span begins with the word of a token drawn among those that are not hidden yet, and has :func:`span_lengths`
    words, or as many as the text goes on for. Spans may run into each other: neighbours are one.

    Args:
        candidates: bool.
        words: int64, rising in each sequence: the number of the word that a token belongs to. Each token is one by
            default.

    Returns:
        Which tokens are hidden, bool, and the number of the run of hidden tokens that each belongs to, int64, 0 for
        none.

    Source:
        Joshi et al. 2020 (SpanBERT), section 3.1, and the authors' ``PairWithSpanMaskingScheme`` and
        ``merge_intervals``. There the budget is rounded up.
    """
    batch, length = candidates.shape
    if words is None:
        words = torch.arange(length, device=candidates.device).expand(batch, -1)
    text = (~candidates).cumsum(1)  # one number for each stretch of candidates
    hidden, left = torch.zeros_like(candidates), budget(candidates, share)
    while bool((left > 0).any()):  # each round hides one token at least wherever some are left to hide
        free = candidates & ~hidden
        draw = torch.rand(batch, generator=numbers, device=candidates.device, dtype=torch.float64)
        anchor = (draw * free.sum(1)).long()
        at = ((free.cumsum(1) == anchor[:, None] + 1) & free).long().argmax(1, keepdim=True)
        size = span_lengths(batch, numbers, longest, geometric)
        first = words.gather(1, at)
        inside = (words >= first) & (words < first + size[:, None]) & (text == text.gather(1, at)) & free
        hidden |= inside & (inside.cumsum(1) <= left[:, None])
        left = budget(candidates, share) - hidden.sum(1)
    begins = hidden.clone()
    begins[:, 1:] &= ~hidden[:, :-1]
    return hidden, begins.cumsum(1) * hidden


def words_of(ids: Tensor, continues: Tensor) -> Tensor:
    """The word that each token belongs to, counted from 0. ``continues``, (vocabulary,), is True for tokens that go on
    with the word before, as WordPiece's ``##ing``."""
    return ((~continues[ids]).long().cumsum(1) - 1).clamp(min=0)


def corrupt(
    ids: Tensor,
    hidden: Tensor,
    mask_token: int,
    vocabulary: int,
    numbers: torch.Generator,
    masked: float = 0.8,
    random: float = 0.1,
    groups: Tensor | None = None,
) -> Tensor:
    """Hidden tokens replaced by the mask token, by a random one, or by themselves, in these shares.

    Args:
        ids, hidden: int64 and bool.
        groups: Tokens of one number, above 0, get the same treatment: spans.

    Source:
        Devlin et al. 2019, section 3.1: 80, 10 and 10 %. SpanBERT: by span.
    """
    draw = torch.rand(ids.shape, generator=numbers, device=ids.device)
    if groups is not None:
        draw = draw.gather(1, groups % ids.shape[1])
    anything = torch.randint(vocabulary, ids.shape, generator=numbers, device=ids.device)
    out = torch.where(hidden & (draw < masked), torch.full_like(ids, mask_token), ids)
    return torch.where(hidden & (draw >= masked) & (draw < masked + random), anything.to(ids.dtype), out)


def hide_span(lengths: Tensor, share: float, numbers: torch.Generator) -> tuple[Tensor, Tensor]:
    """One span in each sequence: its start and its size, (batch,).

    The size is ``round(share * length)``. It begins at the beginning in 20 % of the sequences, ends at the end in 20 %,
    and lies anywhere in the others.

    Source:
        Song et al. 2019 (MASS), section 3.2, and the authors' code for where it begins.
    """
    size = (lengths * share).round().long().clamp(min=1).minimum(lengths)
    draw = torch.rand(2, len(lengths), generator=numbers, device=lengths.device)
    last = lengths - size
    start = (draw[1] * (last + 1)).long()
    start = torch.where(draw[0] < 0.2, 0, torch.where(draw[0] < 0.4, last, start))
    return start, size
