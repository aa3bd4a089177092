"""The first tokens of a row meet each other in both directions."""

from __future__ import annotations

from typing import Any

from eke_attention.kernels import Call, Mod
from eke_attention.patterns.base import Pattern, positive


class Prefix(Pattern):
    """The first ``length`` tokens meet each other in both directions, the others those before them.

    For models without a causal mask of their own, which would forbid it again.

    Args:
        length: Tokens of the prefix.
        block: Tokens of a block.
    """

    fixed = True

    def __init__(self, length: int, block: int = 64) -> None:
        positive(length=length, block=block)
        self.length, self.block = length, block

    def mod(self, call: Call, layer: dict[str, Any], training: bool) -> Mod:
        return lambda b, h, q, k: (k <= q) | (k < self.length)
