"""The methods by name: peft's and those that peft lacks; and what a model has been given already.

BitFit, Ben Zaken, Goldberg, Ravfogel 2021, https://arxiv.org/abs/2106.10199, and ``"head"`` put nothing in.
"""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from eke_peft.adapters import Adapter
from eke_peft.intrinsic import Fastfood
from eke_peft.library import LIBRARY
from eke_peft.prompts import Prompts

OWN: dict[str, dict[str, Any]] = {
    "head": {},
    "bitfit": {},
    "adapters": {"width": 64, "after_attention": True},
    "vpt": {"tokens": 5, "deep": False, "prefix": 1, "dropout": 0.0},
    "intrinsic": {"dimension": 1000, "parameters": "blocks"},
}
METHODS = (*LIBRARY, *OWN)


def close_fast_path(layer: nn.TransformerEncoderLayer) -> None:
    """Keep torch from computing a layer in one piece, from the base's weights alone, where they do not train."""
    layer.eke_activation, layer.activation_relu_or_gelu = layer.activation_relu_or_gelu, 0


def open_fast_path(layer: nn.TransformerEncoderLayer) -> None:
    """Undo :func:`close_fast_path`."""
    if hasattr(layer, "eke_activation"):
        layer.activation_relu_or_gelu = layer.eke_activation
        del layer.eke_activation


def tuned(module: nn.Module) -> str:
    """What a module has been given already; empty where nothing."""
    for part in module.modules():
        if isinstance(part, (BaseTunerLayer, PeftModel)):
            return "peft"
        if isinstance(part, (Adapter, Prompts, Fastfood)):
            return type(part).__name__
    return ""
