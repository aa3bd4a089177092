"""Arguments of a technique, drawn from what its constructor says that it takes."""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from random import Random
from typing import Any, Literal, Union, get_args, get_origin

from eke import argtypes, registry
from eke.spec import Technique

FLOATS = (0.25, 0.3, 0.5, 0.75, 0.9)
INTEGERS = (1, 2, 3, 4)
POINTS = (0.3, 0.5, 3, "1 epochs")  # of a run, for arguments that are a number or words


def module_of(name: str) -> Any:
    """The module that declares a technique: of its entry point, or the one named in ``"module:Class"``."""
    return import_module(name.partition(":")[0]) if ":" in name else import_module(registry.available()[name].module)


def factory_of(name: str) -> Any:
    """What builds a technique."""
    return getattr(module_of(name), name.partition(":")[2]) if ":" in name else registry.get(name).resolve()


def record_of(name: str) -> Technique:
    """The record of a technique."""
    return factory_of(name).technique if ":" in name else registry.get(name)


def build(name: str, arguments: Mapping[str, Any]) -> object:
    """Build a technique."""
    return factory_of(name)(**arguments) if ":" in name else registry.create(name, **arguments)


def draw_arguments(random: Random, name: str, kit: bool = True) -> dict[str, Any]:
    """Arguments that the constructor accepts: its example's or its defaults, some of them changed.

    A module may say by ``TRY`` what is worth trying where an annotation does not: ``TRY = {"method": ("lora",)}``.

    Args:
        random: Draws.
        name: Of the technique.
        kit: Whether the model is one of the kit's shapes, for which examples are made. For another one, an argument
            that ``TRY`` names is left at its default where it is not drawn.
    """
    module = module_of(name)
    example, worth = dict(getattr(module, "EXAMPLE", {})), getattr(module, "TRY", {})
    if not kit:
        example = {argument: value for argument, value in example.items() if argument not in worth}
    if random.random() < 0.4:
        return example
    factory = factory_of(name)
    wanted = argtypes.of(factory)
    parameters = inspect.signature(factory).parameters
    for _ in range(4):
        drawn = dict(example)
        for argument, parameter in parameters.items():
            chosen = random.random()  # drawn for each, so that one argument more changes the others little
            if argument in worth:
                values = tuple(worth[argument])
            elif argument in example or argument not in wanted:
                continue
            else:
                values = _values(wanted[argument], parameter.default)
            if values and chosen < 0.4:
                drawn[argument] = random.choice(values)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                build(name, drawn)
        except Exception:  # what goes together is known to the constructor alone: draw again
            continue
        return drawn
    return example


def _values(wanted: Any, default: Any) -> tuple[Any, ...]:
    """Values of an annotation that are worth trying; none where only a person knows them."""
    origin, inner = get_origin(wanted), get_args(wanted)
    if origin in (Union, types.UnionType):
        if set(inner) >= {float, str}:
            return POINTS
        return tuple(value for one in inner for value in _values(one, default))
    if origin is Literal:
        return inner
    if wanted is bool:
        return (True, False)
    # What is large is a time or a size, for which a share would be another thing.
    if wanted is int:
        return INTEGERS
    if wanted is float:
        return FLOATS if not isinstance(default, float) or default <= 2 else (default, 2 * default)
    if origin in (list, tuple, Sequence) and inner and inner[0] is float:
        return ([0.5], [0.3, 0.6])
    return ()
