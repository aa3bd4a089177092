"""What several checks look at."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from eke import EkeError
from lightning.fabric.utilities.exceptions import MisconfigurationException

REFUSALS = (MisconfigurationException, ValueError, EkeError)


@contextmanager
def empty_folder() -> Iterator[str]:
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(here)


def finite_losses(state: dict[str, Any]) -> None:
    bad = [name for name, step in state["steps"].items() if step.get("loss") is None or step["loss"] - step["loss"]]
    assert not bad, f"the loss is not finite at: {some(bad)}"


def trace(state: dict[str, Any], part: str) -> dict[str, Any]:
    return {name: step.get(part) for name, step in state["steps"].items()}


def learning_rates(state: dict[str, Any]) -> list[Any]:
    """Learning rate of each group at each optimizer step."""
    return [step["learning rate"] for step in state["steps"].values() if "learning rate" in step]


def equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first, second)


def some(names: list[str], show: int = 6) -> str:
    more = f" and {len(names) - show} more" if len(names) > show else ""
    return ", ".join(names[:show]) + more


def transformers_missing() -> bool:
    """Whether the Hugging Face shape cannot be built on this machine."""
    return importlib.util.find_spec("transformers") is None
