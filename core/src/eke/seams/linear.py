"""Linear maps of any library: layers, parts of layers, and parameters that a module multiplies by itself.

The trick it hides: Hugging Face's ``Conv1D`` keeps its weight the other way round, an adapter has the weight of the
layer inside of it, bitsandbytes packs it, and experts are stacked in one tensor that belongs to no layer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from eke.seams.blocks import is_linear

_WIDE = re.compile(r"gate_up|up_gate|gate_and_up|wi|w12|fc1|dense_h_to_4h|input_linear")
UP = re.compile(r"(.*[._])?(up|up_proj|wi|wi_1|w3|fc1|c_fc|lin1|linear1|intermediate|dense_h_to_4h)_?\w*(\.dense)?")
DOWN = re.compile(r"(.*[._])?(down|down_proj|wo|w2|fc2|c_proj|lin2|linear2|output|dense_4h_to_h)_?\w*(\.dense)?")


@dataclass(frozen=True, eq=False)
class Map:
    """One linear map of a block: a layer, part of one, or a parameter that a module multiplies by itself.

    Attributes:
        path: Dotted path of the module in the block.
        module: The module that holds the weight.
        weight: Name of the weight in it, ``"in_proj_weight"`` in ``nn.MultiheadAttention``.
        inputs, outputs: Features in and out, of one expert where there are several.
        rows: Which of the layer's outputs are this map's, ``(first, end)``, where one layer holds several maps.
        experts: How many maps are stacked in one tensor; 0 where there is no such stack.
        is_layer: The module is called to apply it, so that a hook or another layer can take its place.
    """

    path: str
    module: nn.Module
    weight: str
    inputs: int
    outputs: int
    rows: tuple[int, int] | None = None
    experts: int = 0
    is_layer: bool = True

    @property
    def bias(self) -> str | None:
        """Name of the bias in the module; None where there is none."""
        name = self.weight.replace("weight", "bias") if "weight" in self.weight else f"{self.weight}_bias"
        return name if isinstance(getattr(self.module, name, None), Tensor) else None

    def parameters(self) -> list[nn.Parameter]:
        """Weight and bias, of all maps that lie in them."""
        found = [getattr(self.module, name) for name in (self.weight, self.bias) if name is not None]
        return [one for one in found if isinstance(one, nn.Parameter)]

    @property
    def transposed(self) -> bool:
        """The weight is kept as (..., inputs, outputs), as Hugging Face's ``Conv1D`` does."""
        return _transposed(self.module) or (self.experts > 0 and self._stack()[-2] == self.inputs != self._stack()[-1])

    def matrix(self) -> Tensor:
        """The weight as (outputs, inputs), or (experts, outputs, inputs): a view, not detached."""
        weight = getattr(self.module, self.weight)
        weight = weight.flatten(1) if isinstance(self.module, _ConvNd) else weight
        weight = weight.transpose(-1, -2) if self.transposed else weight
        return weight if self.rows is None else weight[..., slice(*self.rows), :]

    def _stack(self) -> torch.Size:
        return getattr(self.module, self.weight).shape


def linear_maps(module: nn.Module, width: int | None = None) -> list[Map]:
    """Every linear map in a module, in the order of ``named_modules``: layers, not what lies in them, and parameters
    of modules that multiply by themselves (``nn.MultiheadAttention``'s, stacked experts with a known ``width``)."""
    found: list[Map] = []
    _collect(module, "", width, found, set())
    return found


def _collect(module: nn.Module, path: str, width: int | None, found: list[Map], seen: set[int]) -> None:
    if id(module) in seen:
        return
    seen.add(id(module))
    if is_linear(module):
        found.append(layer_map(path, module))
        return
    own = [(name, p) for name, p in module.named_parameters(recurse=False) if p is not None]
    if isinstance(module, nn.MultiheadAttention):
        found += [parameter_map(path, module, name, p) for name, p in own if p.ndim == 2]
    for name, p in own:
        if p.ndim == 3 and width is not None and width in p.shape[1:] and len(p) > 1:
            found.append(_stacked(path, module, name, p, width))
    for name, child in module.named_children():
        _collect(child, f"{path}.{name}" if path else name, width, found, seen)


def features(layer: nn.Module) -> tuple[int, int]:
    """Features in and out of a linear layer of any library."""
    if hasattr(layer, "in_features"):
        return layer.in_features, layer.out_features
    if isinstance(layer, _ConvNd):
        return layer.in_channels, layer.out_channels
    first, second = layer.weight.shape
    return (first, second) if _transposed(layer) else (second, first)


def _transposed(layer: nn.Module) -> bool:
    return type(getattr(layer, "base_layer", layer)).__name__.endswith("Conv1D") and hasattr(
        getattr(layer, "base_layer", layer), "nf"
    )


def layer_map(path: str, module: nn.Module) -> Map:
    return Map(path, module, "weight", *features(module))


def parameter_map(path: str, module: nn.Module, name: str, p: Tensor) -> Map:
    return Map(path, module, name, p.shape[1], p.shape[0], is_layer=False)


def _stacked(path: str, module: nn.Module, name: str, p: Tensor, width: int) -> Map:
    first, second = p.shape[1:]
    down = bool(DOWN.fullmatch(name)) or (not UP.search(name) and not _WIDE.search(name) and first == width)
    other = second if first == width else first
    inputs, outputs = (other, width) if down else (width, other)
    return Map(path, module, name, inputs, outputs, experts=len(p), is_layer=False)


def once(maps: list[Map]) -> list[Map]:
    """Each layer once; of maps that share one, the whole."""
    seen: dict[tuple[int, str], Map] = {}
    for one in maps:
        key = id(one.module), one.weight
        if key in seen and one.rows is not None:
            whole = getattr(one.module, one.weight)
            outputs = whole.shape[-1 if one.transposed else -2]
            seen[key] = replace(seen[key], rows=None, outputs=outputs)
        else:
            seen.setdefault(key, one)
    return list(seen.values())
