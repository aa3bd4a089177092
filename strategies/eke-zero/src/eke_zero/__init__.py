"""ZeRO: optimizer states, gradients and weights divided among processes.

Importing it registers the strategy's names.
"""

from eke_zero.strategy import NAMES, ZeRO, ZeROError, register

__all__ = ["NAMES", "ZeRO", "ZeROError"]

register()
