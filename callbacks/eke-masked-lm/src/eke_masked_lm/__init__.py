"""Masked language modelling: which tokens are hidden, by what, and a head that runs on them alone."""

from eke_masked_lm.callback import MASS, MaskedLM, MaskingError
from eke_masked_lm.masks import (
    choose_spans,
    choose_tokens,
    choose_words,
    corrupt,
    hide_span,
    span_lengths,
    words_of,
)

__all__ = [
    "MASS",
    "MaskedLM",
    "MaskingError",
    "choose_spans",
    "choose_tokens",
    "choose_words",
    "corrupt",
    "hide_span",
    "span_lengths",
    "words_of",
]
