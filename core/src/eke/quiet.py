"""Keep messages from the screen where nobody reads them: Lightning's in tests, forecasts and measurements, and those of
libraries that are imported."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGERS = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
_WHAT_AN_IMPORT_TELLS = ("torchao", "torch.utils._pytree")  # kernels for other GPUs, advice to torchao's authors


@contextmanager
def importing() -> Iterator[None]:
    """Keep back what libraries log when they are imported and a user can do nothing about: for imports inside of it."""
    with _errors_alone(_WHAT_AN_IMPORT_TELLS):
        yield


@contextmanager
def quiet(all_warnings: bool = False) -> Iterator[None]:
    """Let Lightning print nothing below an error, and not warn of what only a person at a terminal wants to know.

    Args:
        all_warnings: Whether other warnings are kept back too, those of techniques and of the user's code included.
    """
    with warnings.catch_warnings(), _errors_alone(_LOGGERS):
        if all_warnings:
            warnings.simplefilter("ignore")
        else:
            from lightning.fabric.utilities.warnings import PossibleUserWarning

            warnings.simplefilter("ignore", PossibleUserWarning)
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`, callbacks")
            warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="lightning")
        yield


@contextmanager
def _errors_alone(names: tuple[str, ...]) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
