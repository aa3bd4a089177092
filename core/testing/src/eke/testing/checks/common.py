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
from eke.testing.compare import assert_same, differences
from eke.testing.models import TinyModel
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils._pytree import tree_map

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


def assert_same_weights(
    model: type[TinyModel], first: dict[str, Any], second: dict[str, Any], what: str, tolerance: float
) -> None:
    """Compare two runs' weights up to ``tolerance``, without those that rounding alone decides.

    The bias of a key has no influence on attention: its gradient is zero in exact arithmetic, and in float32 whatever
    rounding leaves, which another order of sums makes another. A method that goes by the sign of a gradient makes full
    steps of it. Which weights these are is measured (:func:`made_of_rounding`), and only where the runs differ.
    """
    found = differences(first, second, tolerance)
    if not found:
        return
    noise = made_of_rounding(model)

    def determined(weights: dict[str, Any]) -> dict[str, Any]:
        fitting = {name: noise[name] for name in weights if name in noise and noise[name].shape == weights[name].shape}
        return {**weights, **{name: weights[name].masked_fill(mask, 0.0) for name, mask in fitting.items()}}

    assert_same(determined(first), determined(second), what, tolerance)


def made_of_rounding(model: type[TinyModel]) -> dict[str, torch.Tensor]:
    """Of each parameter, where its gradient is zero but for rounding: in float64, over all batches of an epoch, below a
    thousandth of what it is in float32."""
    largest: dict[torch.dtype, dict[str, torch.Tensor]] = {torch.float32: {}, torch.float64: {}}
    for batch in model().train_dataloader():
        for dtype, seen in largest.items():
            for name, gradient in _gradients(model(), batch, dtype).items():
                seen[name] = torch.maximum(seen.get(name, gradient.abs()), gradient.abs())
    return {name: largest[torch.float64][name] < 1e-3 * one.double() for name, one in largest[torch.float32].items()}


def _gradients(model: TinyModel, batch: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = model.to(dtype)
    batch = tree_map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, batch)
    weights = dict(model.named_parameters())
    return dict(zip(weights, torch.autograd.grad(model.loss(batch), list(weights.values())), strict=True))
