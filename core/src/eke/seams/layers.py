"""Put other layers in the place of a model's layers of a kind, and take them back.

What hangs on a layer's place, and is hidden here: a layer that stands at two places is one layer afterwards too; a
weight that is tied stays tied; optimizers, sharding and checkpoints know parameters by identity and by name, so that a
layer which is to hold the same ones has to say so; blocks may be copied while their layers are replaced; whoever
replaces a weight (FSDP2 does) replaces it in the layer that stands there now, from where it goes back.

It knows no Lightning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn

from eke.seams.names import match, parent_of, plain
from eke.spec import EkeError

LINEAR = ("Linear", "Conv1D", "Linear4bit", "Linear8bitLt")
_MARK = "_eke_instead_of"


class LayersError(EkeError, ValueError):
    """A layer that cannot take another's place."""


def find_layers(
    module: nn.Module,
    patterns: str | Iterable[str] | None = None,
    kinds: Iterable[str] = LINEAR,
    argument: str = "layers",
) -> dict[str, nn.Module]:
    """The layers of a kind, by plain name, but for those inside of ``nn.MultiheadAttention``, which reads their weights
    without calling them.

    Args:
        module: Any.
        patterns: As :func:`~eke.seams.names.match` has them. None takes all.
        kinds: Names of classes; a subclass of another name is another kind.
        argument: What the user calls the patterns.

    Raises:
        NamesError: a pattern that meets no layer of the kind.
    """
    inside = {id(part) for whole in module.modules() if isinstance(whole, nn.MultiheadAttention)
              for part in whole.modules()}  # fmt: skip
    found = {
        plain(name): part
        for name, part in module.named_modules()
        if type(part).__name__ in tuple(kinds) and id(part) not in inside
    }
    if patterns is None:
        return found
    return {name: found[name] for name in match(found, patterns, argument)}


def swap(
    module: nn.Module,
    names: Iterable[str],
    build: Callable[[nn.Module], nn.Module],
    owner: str,
    keys: Literal["same", "own"] = "same",
) -> dict[str, nn.Module]:
    """Put what ``build`` makes of each layer in its place.

    Args:
        module: The model.
        names: Of the layers. One that stands at several places is built once and stands at all of them.
        build: Gets a layer and gives the one that stands in for it. It may give the layer itself, of another class.
        owner: Who does it; :func:`restore` undoes all of one owner's.
        keys: ``"same"``: the new layer has the parameters and buffers of the old one under the same names, so that
            checkpoints load with it and without it, strictly. ``"own"``: it has others, such as two factors.

    Returns:
        The layers that stood there, by name.

    Raises:
        LayersError: other keys than the old layer's, with ``keys="same"``; a parameter that something else of the
            model uses as well, and that the new layer has no more; another owner's layer. Nothing is changed then.
    """
    old = {plain(name): _get(module, name) for name in names}
    uses = _uses(module)
    built: dict[int, nn.Module] = {}
    try:
        for name, layer in old.items():
            if _MARK in vars(layer):
                raise LayersError(
                    f"{name!r} stands in for another layer already, put there by {vars(layer)[_MARK][0]}."
                )
            if id(layer) not in built:
                built[id(layer)] = _built(name, layer, build, owner, keys, uses)
    except BaseException:
        for layer in old.values():
            if id(layer) in built:
                _back(built[id(layer)])
        raise
    for name, parent, child, layer in _places(module):
        if id(layer) in built and built[id(layer)] is not layer:
            setattr(parent, child, built[id(layer)])
            old.setdefault(name, layer)
    return old


def restore(module: nn.Module, owner: str) -> None:
    """Put all layers back that ``owner`` has replaced, in copied blocks too, with the parameters that are there now."""
    known: dict[int, nn.Module] = {}
    for _, parent, child, layer in _places(module):
        mark = vars(layer).get(_MARK)
        if (mark is not None and mark[0] == owner) or id(layer) in known:
            if id(layer) not in known:
                known[id(layer)] = _back(layer)
            if known[id(layer)] is not layer:
                setattr(parent, child, known[id(layer)])


def swapped(module: nn.Module, owner: str) -> dict[str, nn.Module]:
    """What stands in for other layers by ``owner``, by plain name."""
    return {plain(name): part for name, part in module.named_modules() if vars(part).get(_MARK, ("",))[0] == owner}


def place(module: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    """Put a layer at a name for good, in the mode of what stood there, and return that."""
    parent, child = parent_of(module, name)
    before = parent.get_submodule(child)
    setattr(parent, child, layer)
    layer.train(before.training)
    return before


def _called(layer: nn.Module, args: Any) -> None:
    """A hook that does nothing: with it, torch's encoder layers call a layer and do not read its weights past it."""


def _get(module: nn.Module, name: str) -> nn.Module:
    parent, child = parent_of(module, name)
    return parent.get_submodule(child)


def _built(
    name: str, layer: nn.Module, build: Callable[[nn.Module], nn.Module], owner: str, keys: str, uses: dict[int, int]
) -> nn.Module:
    before, kind, attributes = dict(layer.named_parameters()), type(layer), set(vars(layer))
    entries = set(layer.state_dict())
    new = build(layer)
    handle = new.register_forward_pre_hook(_called)
    vars(new)[_MARK] = owner, (kind, attributes) if new is layer else layer, handle
    new.train(layer.training)
    after = dict(new.named_parameters())
    lost = [key for key, p in before.items() if after.get(key) is not p]
    try:
        if keys == "same" and (differ := sorted(entries ^ set(new.state_dict()))):
            raise LayersError(
                f"{name!r} becomes a {type(new).__name__}, whose state has {', '.join(differ[:3])} and not what a "
                f"{kind.__name__} has: checkpoints would not load without it. Give keys='own' if that is meant."
            )
        if tied := [key for key in lost if uses[id(before[key])] > len(_where(layer, before[key]))]:
            raise LayersError(
                f"{name}.{tied[0]} is tied to another parameter of the model, and the {type(new).__name__} in its "
                "place does not hold it: the two would part. Leave this layer out."
            )
    except LayersError:
        _back(new)
        raise
    return new


def _back(new: nn.Module) -> nn.Module:
    """The layer that a new one stands in for, as it was, with the parameters that the new one has now."""
    _, old, handle = vars(new).pop(_MARK)
    handle.remove()
    if isinstance(old, tuple):  # the layer itself, of another class
        kind, attributes = old
        for name in set(vars(new)) - attributes:
            delattr(new, name)
        new.__class__ = kind
        return new
    for name, parameter in new.named_parameters(recurse=False):
        if name in old._parameters and parameter.shape == old._parameters[name].shape:
            old._parameters[name] = parameter
    old.train(new.training)
    return old


def _places(module: nn.Module) -> list[tuple[str, nn.Module, str, nn.Module]]:
    """Every place of a module in another: its plain name, the other, its name there, and the module."""
    found = []
    for name, parent in module.named_modules():
        for child, layer in parent._modules.items():
            if layer is not None:
                found.append((plain(f"{name}.{child}" if name else child), parent, child, layer))
    return found


def _uses(module: nn.Module) -> dict[int, int]:
    """By ``id`` of a parameter, how many modules hold it."""
    found: dict[int, int] = {}
    for part in module.modules():
        for parameter in part._parameters.values():
            if parameter is not None:
                found[id(parameter)] = found.get(id(parameter), 0) + 1
    return found


def _where(layer: nn.Module, parameter: nn.Parameter) -> list[nn.Module]:
    return [part for part in layer.modules() if any(p is parameter for p in part._parameters.values())]


class Transposed(nn.Module):
    """A layer for ``nn.Linear`` in the place of Hugging Face's ``Conv1D``, whose weight is (inputs, outputs).

    It holds the ``Conv1D``'s own parameters, and runs the other layer's code on the transposed weight: optimizers and
    checkpoints see what they saw.

    Args:
        layer: The ``Conv1D``.
        build: Gets an ``nn.Linear`` of the same sizes without content, and gives the layer that is to compute.
    """

    def __init__(self, layer: nn.Module, build: Callable[[nn.Linear], nn.Module]) -> None:
        super().__init__()
        inputs, outputs = layer.weight.shape
        self.nx, self.nf = inputs, outputs
        self.weight, self.bias = layer.weight, layer.bias
        empty = nn.Linear(inputs, outputs, bias=layer.bias is not None, device="meta", dtype=layer.weight.dtype)
        vars(self)["inner"] = build(empty)  # no child: it has no parameters of its own

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given: dict[str, Any] = {"weight": self.weight.t()}
        if self.bias is not None:
            given["bias"] = self.bias
        self.inner.training = self.training
        return torch.func.functional_call(self.inner, given, (x,))


def is_conv1d(layer: nn.Module) -> bool:
    """Hugging Face's ``Conv1D``: a linear layer with its weight the other way round."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")
