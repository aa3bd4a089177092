"""The refusal of a run: apart from :mod:`eke.spec`, which imports no Lightning."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException

from eke.spec import EkeError


class RunError(EkeError, MisconfigurationException, ValueError):
    """A technique cannot work in this run: with this model, data, Trainer or strategy."""
