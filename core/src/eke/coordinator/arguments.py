"""The arguments of techniques in a checkpoint, and what of them a resumed run has changed.

The tricks it hides: an argument may be a function or an object, of which only what stays the same from process to
process can be compared; and a technique may change its own attributes in a run, so that its arguments are taken down
when it is built.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import os
import re
import types
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from eke import argtypes

if TYPE_CHECKING:
    from eke.technique import TechniqueCallback

PLACE = "(a place on this machine)"  # how a path or a device is written, so that two are never told apart

_LONG = 256  # elements of a list, of which the rest is told apart by a hash
_DEEP = 12  # lists within lists; an object within an object counts for three


def noting(constructor: Callable[..., None]) -> Callable[..., None]:
    """A constructor that also takes down, as plain values, with which arguments the object was built."""

    @functools.wraps(constructor)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        constructor(self, *args, **kwargs)
        if type(self).__init__ is __init__:  # not that of a base class, called by the object's own
            bound = inspect.signature(constructor).bind(self, *args, **kwargs)
            bound.apply_defaults()
            given = _flat(inspect.signature(constructor), bound.arguments)
            # What the constructor made of an argument says more than what was given: 0.5 in place of None.
            self._arguments = {name: describe(vars(self).get(name, value)) for name, value in given.items()}

    return __init__


def of(technique: TechniqueCallback) -> dict[str, Any]:
    """The arguments of a technique as plain values, by their names."""
    if technique._arguments is None:  # no constructor of its own was called, such as one that a decorator wrote
        signature = inspect.signature(type(technique).__init__)
        defaults = {name: one.default for name, one in signature.parameters.items() if one.default is not one.empty}
        kept = {name: vars(technique)[name] for name in signature.parameters if name in vars(technique)}
        technique._arguments = {name: describe(value) for name, value in {**defaults, **kept}.items()}
    return dict(technique._arguments)


def changed(
    technique: TechniqueCallback, saved: Mapping[str, Any], names: Sequence[str] | None = None
) -> dict[str, tuple[Any, Any]]:
    """Which arguments are others than in a checkpoint, each with what it was and what it is.

    An argument that the checkpoint does not know, as one of an earlier version, counts by its default.

    Args:
        technique: Of this run.
        saved: What :func:`of` gave when the checkpoint was written.
        names: Look at these alone.
    """
    here = of(technique)
    parameters = inspect.signature(type(technique).__init__).parameters
    open_ended = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    places = {name for name, wanted in argtypes.of(type(technique)).items() if _names_a_place(wanted)}
    found = {}
    for name in [*here, *(name for name in saved if name not in here and open_ended)]:
        if name in places or (names is not None and name not in names):
            continue
        default = parameters[name].default if name in parameters else None
        before = saved.get(name, None if default is inspect.Parameter.empty else describe(default))
        if not same(before, here.get(name)):
            found[name] = (before, here.get(name))
    return found


def describe(value: Any) -> Any:
    """A value as numbers, strings, lists and dicts, which are the same in another process if the value is.

    Objects are their class and what they hold in public attributes (a dataclass: its fields), functions their name and
    what they were given, tensors a hash of what is in them, modules one of how they are built, paths and devices
    :data:`PLACE`.
    """
    return _described(value, 0, set())


def same(first: Any, second: Any) -> bool:
    """Whether two descriptions say the same; NaN is NaN."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second or (first != first and second != second)


def written(name: str, before: Any, after: Any) -> tuple[str, str]:
    """``"keep=0.5"`` and ``"keep=0.3"``; of a long mapping or object, the one entry that differs."""
    while len(_text(before)) > 80 or len(_text(after)) > 80:
        if not (isinstance(before, dict) and isinstance(after, dict)):
            break
        differ = [key for key in {**before, **after} if not same(before.get(key), after.get(key))]
        if not differ:
            break
        name, before, after = f"{name}[{differ[0]!r}]", before.get(differ[0]), after.get(differ[0])
    return f"{name}={_text(before)}", f"{name}={_text(after)}"


def _flat(signature: inspect.Signature, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, those that ``**kwargs`` took among them, without the object itself."""
    flat = {}
    for name, value in list(given.items())[1:]:
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            flat.update(value)
        else:
            flat[name] = value
    return flat


def _names_a_place(wanted: Any) -> bool:
    if inspect.isclass(wanted) and issubclass(wanted, (os.PathLike, torch.device)):
        return True
    return any(_names_a_place(one) for one in get_args(wanted))


def _described(value: Any, depth: int, seen: set[int]) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value if value is None or type(value) in (bool, str) else str(value)
    if isinstance(value, Enum):
        return _described(value.value, depth + 1, seen)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, (os.PathLike, torch.device)):
        return PLACE
    if isinstance(value, (torch.dtype, complex, range, slice)):
        return str(value)
    if isinstance(value, (bytes, bytearray)):
        return {"class": "bytes", "hash": _hash(bytes(value))}
    if depth > _DEEP:
        return {"class": type(value).__qualname__}
    if isinstance(value, Mapping):
        return {str(key): _described(item, depth + 1, seen) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((_described(item, depth + 1, seen) for item in value), key=repr)
    if isinstance(value, (list, tuple)):
        items = [_described(item, depth + 1, seen) for item in value]
        if len(items) <= _LONG:
            return items
        return {"class": type(value).__name__, "length": len(items), "hash": _hash(repr(items).encode())}
    if isinstance(value, Tensor):
        return _described_tensor(value)
    if type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "tolist"):
        return _described(value.tolist(), depth + 1, seen)
    if isinstance(value, nn.Module):
        weights = [f"{name} {tuple(one.shape)}" for name, one in value.named_parameters()]
        looks = re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # with a dropout's rate, or the size of a transform
        return {"class": type(value).__qualname__, "hash": _hash("\n".join([looks, *weights]).encode())}
    if id(value) in seen:
        return {"class": type(value).__qualname__}
    seen.add(id(value))
    return _described_object(value, depth + 3, seen)


def _described_tensor(tensor: Tensor) -> dict[str, Any]:
    found = {"class": "Tensor", "shape": list(tensor.shape), "dtype": str(tensor.dtype)}
    if type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and tensor.layout is torch.strided:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        found["hash"] = _hash(flat.view(torch.uint8).numpy().tobytes())
    return found


def _described_object(value: Any, depth: int, seen: set[int]) -> Any:
    if isinstance(value, functools.partial):
        held = {"function": value.func, **({"args": value.args} if value.args else {}), **value.keywords}
        name = ""
    elif isinstance(value, (type, types.BuiltinFunctionType)):
        held, name = {}, value.__qualname__
    elif isinstance(value, types.MethodType):
        held, name = {"of": value.__self__}, value.__func__.__qualname__
    elif isinstance(value, types.FunctionType):
        closed = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        held = {name: cell.cell_contents for name, cell in closed if _has_content(cell)}
        held = {key: one for key, one in held.items() if isinstance(one, (bool, int, float, str, tuple))}
        name = value.__qualname__
    else:
        fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
        held = {one.name: getattr(value, one.name, None) for one in fields} or dict(getattr(value, "__dict__", {}))
        held = {key: one for key, one in held.items() if isinstance(key, str) and not key.startswith("_")}
        name = ""
    inside = {key: _described(one, depth, seen) for key, one in held.items()}
    return {"class": type(value).__qualname__, **({"name": name} if name else {}), **inside}


def _has_content(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _text(described: Any) -> str:
    if isinstance(described, dict) and "class" in described:
        inside = ", ".join(f"{key}={_text(item)}" for key, item in described.items() if key != "class")
        return f"{described['class']}({inside})"
    if isinstance(described, dict):
        return "{" + ", ".join(f"{key!r}: {_text(item)}" for key, item in described.items()) + "}"
    if isinstance(described, list):
        return "[" + ", ".join(map(_text, described)) + "]"
    return repr(described)
