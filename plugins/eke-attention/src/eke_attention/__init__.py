"""Attention by another kernel, or on fewer pairs of tokens."""

from eke_attention.kernels import AttentionError, Call, naive
from eke_attention.patterns import (
    A3,
    DOTA,
    ELSA,
    Documents,
    Pattern,
    Predicted,
    Prefix,
    Sanger,
    SlidingWindow,
    ViTCoD,
    covering,
    pack,
    pairs,
    polarize,
    recall,
)
from eke_attention.plugin import Attention

__all__ = [
    "A3",
    "Attention",
    "AttentionError",
    "Call",
    "DOTA",
    "Documents",
    "ELSA",
    "Pattern",
    "Predicted",
    "Prefix",
    "Sanger",
    "SlidingWindow",
    "ViTCoD",
    "covering",
    "naive",
    "pack",
    "pairs",
    "polarize",
    "recall",
]
