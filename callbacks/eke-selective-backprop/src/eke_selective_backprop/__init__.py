"""Selective backprop: training on the samples of a batch whose loss is high."""

from eke_selective_backprop.callback import SelectiveBackprop, select

__all__ = ["SelectiveBackprop", "select"]
