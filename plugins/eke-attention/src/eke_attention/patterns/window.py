"""Each token meets those near it, and the first ones of a row."""

from __future__ import annotations

from typing import Any

from eke_attention.kernels import Call, Mod
from eke_attention.patterns.base import Pattern, positive


class SlidingWindow(Pattern):
    """Each token meets those up to ``size`` away, and the first ``sinks`` of a row.

    Args:
        size: Tokens to either side; in causal attention, before it.
        sinks: Tokens at the beginning that all meet.
        block: Tokens of a block.
    """

    fixed = True

    def __init__(self, size: int, sinks: int = 0, block: int = 64) -> None:
        positive(size=size, block=block)
        self.size, self.sinks, self.block = size, sinks, block

    def mod(self, call: Call, layer: dict[str, Any], training: bool) -> Mod:
        return lambda b, h, q, k: ((q - k).abs() <= self.size) | (k < self.sinks)
