"""The one error of this distribution."""

from eke import EkeError


class PEFTError(EkeError):
    """A model cannot be tuned so, or a checkpoint does not belong to it."""
