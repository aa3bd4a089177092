"""Sequence-length warm-up: train on short sequences first."""

from eke_length_warmup.callback import LengthWarmup, length_at, token_progress
from eke_length_warmup.sequence import SequenceError, row_length, shorten, split

__all__ = ["SequenceError", "LengthWarmup", "length_at", "row_length", "shorten", "split", "token_progress"]
