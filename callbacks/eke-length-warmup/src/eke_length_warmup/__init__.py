"""Sequence-length warm-up: train on short sequences first."""

from eke_length_warmup.callback import LengthWarmup, length_at, shorten, split

__all__ = ["LengthWarmup", "length_at", "shorten", "split"]
