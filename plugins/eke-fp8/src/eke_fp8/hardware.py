"""The back ends: which of them a machine has, and how each builds a layer. Their packages are imported when used."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace as changed
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from eke import EkeError
from eke.quiet import importing
from eke.seams.layers import Transposed, is_conv1d
from torch import nn

from eke_fp8.arithmetic import RECIPES

SERVES = {  # the first that the machine has
    "te": ("tensorwise", "delayed", "block", "mx"),
    "torchao": ("tensorwise", "rowwise", "rowwise_with_gw_hp"),
    "emulation": tuple(RECIPES),
}
_PACKAGES = {"te": "transformer_engine", "torchao": "torchao"}


class FP8Error(EkeError, ValueError):
    """The machine has no FP8, or the model no layer for it."""


def pick(backend: str, recipe: str, device: torch.device) -> tuple[str, str]:
    """The back end for a machine, and why that one.

    Raises:
        FP8Error: one was demanded that the machine does not have.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    needed = (10, 0) if recipe == "mx" else (9, 0) if recipe == "block" else (8, 9)
    reasons = {}
    for name, package in _PACKAGES.items():
        if recipe not in SERVES[name]:
            reasons[name] = f"{name} has no recipe {recipe!r}"
        elif capability is None:
            reasons[name] = f"{name} needs an NVIDIA GPU, and this runs on the {device.type.upper()}"
        elif capability < needed:
            has = ".".join(map(str, capability))
            reasons[name] = (
                f"{name} with {recipe!r} needs compute capability {needed[0]}.{needed[1]}, and the GPU has {has}"
            )
        elif find_spec(package) is None:
            reasons[name] = f"{package} is not installed: pip install 'eke-fp8[{name}]'"
    if backend in reasons:
        raise FP8Error(
            f"FP8(backend={backend!r}) cannot run here: {reasons[backend]}. backend='emulation' shows the numbers "
            "of FP8 on "
            "any machine, and saves nothing."
        )
    if backend != "auto":
        return backend, "as demanded"
    for name in _PACKAGES:
        if name not in reasons:
            return name, "the first that this machine has"
    return "emulation", "; ".join(reasons.values())


def torchao_linear(recipe: str, emulate: bool = False) -> Callable[[nn.Module], nn.Module]:
    """Builds torchao's layer around a linear layer's own parameters, a ``Conv1D``'s too. ``emulate`` runs without the
    hardware."""
    with importing():
        from torchao.float8 import Float8LinearConfig
        from torchao.float8.float8_linear import Float8Linear

    # Products of a number of tokens that is no multiple of 16 are padded, not refused.
    config = changed(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate, pad_inner_dim=not emulate)

    def build(layer: nn.Module) -> nn.Module:
        return Transposed(layer, build) if is_conv1d(layer) else Float8Linear.from_float(layer, config=config)

    return build


def te_linear() -> Callable[[nn.Linear], nn.Module]:
    """Builds Transformer Engine's layer around a linear layer's own parameters."""
    engine = import_module("transformer_engine.pytorch")

    class Linear(engine.Linear):
        # The scales would be entries of the model's state_dict, under names that a plain model does not know.
        get_extra_state, set_extra_state = nn.Module.get_extra_state, nn.Module.set_extra_state

    def build(layer: nn.Linear) -> nn.Module:
        sizes = layer.in_features, layer.out_features
        built = Linear(*sizes, bias=layer.bias is not None, params_dtype=layer.weight.dtype, device=layer.weight.device)
        built.weight = layer.weight
        if layer.bias is not None:
            built.bias = layer.bias
        return built

    return build


def te_autocast(recipe: str, history: int, margin: int) -> AbstractContextManager:
    """Where Transformer Engine's layers multiply in FP8."""
    engine, recipes = import_module("transformer_engine.pytorch"), import_module("transformer_engine.common.recipe")
    made = {
        "tensorwise": lambda: recipes.Float8CurrentScaling(),
        "delayed": lambda: recipes.DelayedScaling(margin=margin, amax_history_len=history, amax_compute_algo="max"),
        "block": lambda: recipes.Float8BlockScaling(),
        "mx": lambda: recipes.MXFP8BlockScaling(),
    }[recipe]()
    if hasattr(engine, "autocast"):
        return engine.autocast(enabled=True, recipe=made)
    return engine.fp8_autocast(enabled=True, fp8_recipe=made)  # before 2.9


class TEState:
    """The scales of one of Transformer Engine's layers."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.own = layer, type(layer).__mro__[1]

    def state_dict(self) -> dict[str, Any]:
        return {"extra": self.own.get_extra_state(self.layer)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.own.set_extra_state(self.layer, state["extra"])
