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
    return _a(type(value).__name__)


def written(wanted: Any) -> str:
    """An annotation in words: ``"an int"``, ``"a list of floats or None"``, ``"1, 2 or 3"``."""
    origin, inner = get_origin(wanted), get_args(wanted)
    if origin in (Union, types.UnionType):
        return _or([written(one) for one in inner])
    if origin is Literal:
        return _or([repr(one) for one in inner])
    whole = origin or wanted
    if whole in (list, tuple, Sequence, Iterable):
        parts = [one for one in inner if one is not Ellipsis]
        if whole is tuple and len(parts) > 1:
            return f"a list of {len(parts)}: {', '.join(map(written, parts))}"
        return f"a list of {_several(parts[0])}" if parts and parts[0] is not Any else "a list"
    if whole in (dict, Mapping):
        return "a mapping"
    if wanted is type(None) or wanted is None:
        return "None"
    if inspect.isclass(wanted) and not inner:
        return _a(wanted.__name__)
    return re.sub(r"\b(?:[a-z_]+\.)+(?=\w)", "", str(wanted)).replace("NoneType", "None")


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _or(words: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _several(wanted: Any) -> str:
    return f"{wanted.__name__}s" if inspect.isclass(wanted) and not get_args(wanted) else f"({written(wanted)})"
