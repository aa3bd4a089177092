"""ZeRO: optimizer states, gradients and weights divided among processes.

Importing it registers the strategy's names.
"""

from eke_zero.base import ZeROError
from eke_zero.strategy import NAMES, ZeRO, register

__all__ = ["NAMES", "ZeRO", "ZeROError"]

register()
