"""Whether a plain value, as a command line or YAML gives it, fits the annotation of an argument.

Judged is only what is certain: numbers, strings, lists, mappings, literals and unions of them. Anything else, such as a
class of torch's or a function, fits.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin


def of(factory: Callable[..., object]) -> dict[str, Any]:
    """Argument to its annotation; empty where they cannot be resolved."""
    try:
        return typing.get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    except (NameError, TypeError, AttributeError):  # names that are imported for type checkers alone
        return {}


def fits(value: Any, wanted: Any) -> bool:
    """Whether a value fits an annotation; True where that cannot be told."""
    origin, inner = get_origin(wanted), get_args(wanted)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in inner)
    if wanted is type(None) or wanted is None:
        return value is None
    if wanted is bool:
        return isinstance(value, bool)
    if wanted is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if wanted is float:
        return isinstance(value, Real) and not isinstance(value, bool)
    if wanted is str:
        return isinstance(value, str)
    if wanted is Path:
        return isinstance(value, (str, Path))
    whole = origin or wanted
    if whole in (list, tuple, Sequence, Iterable):
        if isinstance(value, str) or not isinstance(value, Iterable):
            return False
        parts = [one for one in inner if one is not Ellipsis]
        if whole is tuple and len(parts) > 1 and isinstance(value, (list, tuple)):
            return len(parts) == len(value) and all(map(fits, value, parts))
        return not parts or not isinstance(value, (list, tuple)) or all(fits(one, parts[0]) for one in value)
    if whole in (dict, Mapping):
        return isinstance(value, Mapping)
    return True


def kind(value: Any) -> str:
    """``"a str"``, ``"an int"``, ``"None"``."""
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def written(wanted: Any) -> str:
    """An annotation as a person writes it."""
    if inspect.isclass(wanted) and not get_args(wanted):
        return "None" if wanted is type(None) else wanted.__name__
    return re.sub(r"\b(?:[a-z_]+\.)+(?=\w)", "", str(wanted)).replace("NoneType", "None")
