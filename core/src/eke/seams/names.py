"""Names of modules and parameters: without what torch.compile puts into them, and matched by one pattern language.

The tricks it hides: a compiled module says ``_orig_mod.`` in the middle of every name that lies in it, so that a
checkpoint of a compiled run and of a plain one have different keys; and a parameter that is used twice (an embedding
that is the head as well) has two names, of which ``named_parameters()`` tells one.

It imports no torch: modules are used by their own methods alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from eke.spec import EkeError

T = TypeVar("T")
_COMPILED = "_orig_mod"


class NamesError(EkeError, ValueError):
    """A pattern that meets no name."""


def plain(name: str) -> str:
    """A dotted name without torch.compile's part in it, wherever that stands."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def plain_keys(named: Mapping[str, T]) -> dict[str, T]:
    """The same values under :func:`plain` names."""
    return {plain(name): value for name, value in named.items()}


def at(module: Any, name: str) -> Any:
    """The module of a dotted name, whether or not a module on the way is compiled.

    Raises:
        AttributeError: there is none.
    """
    for part in plain(name).split(".") if name else ():
        module = _inner(module).get_submodule(part)
    return _inner(module)


def parent_of(module: Any, name: str) -> tuple[Any, str]:
    """The module that holds the one of a dotted name, and its name there, to put another in its place."""
    path, _, child = plain(name).rpartition(".")
    return at(module, path), child


def _inner(module: Any) -> Any:
    while _COMPILED in getattr(module, "_modules", ()):
        module = getattr(module, _COMPILED)
    return module


def match(names: Iterable[str], patterns: str | Iterable[str], argument: str = "patterns") -> list[str]:
    """The names that a pattern meets, in their order.

    A pattern without wildcards meets a name that is it or ends with it: ``"q_proj"`` meets
    ``"layers.0.self_attn.q_proj"``. One with wildcards (``*``, ``?``, ``[...]``) has to meet the whole name, dots
    included: ``"*.mlp.*"``. ``|`` divides alternatives of which one has to meet: ``"*.wte.*|embed*"``. Capital letters
    count. ``torch.compile``'s part of a name does not.

    Args:
        names: Dotted.
        patterns: One or several.
        argument: What the user calls them, for the error: ``"targets"``, ``"train"``, ``"layers"``.

    Raises:
        NamesError: a pattern that meets none of the names. It shows those that are near.
    """
    names = list(names)
    bare = {name: plain(name) for name in names}
    met: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = [name for name in names if _meets(bare[name], plain(pattern))]
        if not found:
            raise NamesError(_nothing(pattern, list(bare.values()), argument))
        met.update(found)
    return [name for name in names if name in met]


def match_parameters(module: Any, patterns: str | Iterable[str], argument: str = "patterns") -> dict[str, Any]:
    """The parameters of a module that a pattern meets by any of their names, each under its first.

    A plain name may also be that of a module, which means all its parameters: ``"lm_head"`` is ``"lm_head.weight"``
    and its bias, also where the embedding's weight is the same parameter.

    Raises:
        NamesError: as :func:`match`.
    """
    aliases = parameter_names(module)
    known = {name: names[0] for names in aliases.values() for name in names}
    holders: dict[str, list[str]] = {}
    for name in known:
        parts = name.split(".")
        for end in range(1, len(parts)):
            holders.setdefault(".".join(parts[:end]), []).append(name)
    met = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            found = match(known, pattern, argument)
        except NamesError:
            if _is_wild(pattern):
                raise
            found = [name for holder in holders if _meets(holder, plain(pattern)) for name in holders[holder]]
            if not found:
                raise
        met.update(known[name] for name in found)
    firsts = {names[0]: parameter for parameter, names in aliases.items()}
    return {name: parameter for name, parameter in firsts.items() if name in met}


def parameter_names(module: Any) -> dict[Any, tuple[str, ...]]:
    """Each parameter of a module with all its plain names; the first is the one of ``named_parameters()``."""
    found: dict[Any, tuple[str, ...]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        found[parameter] = (*found.get(parameter, ()), plain(name))
    return found


def _is_wild(pattern: str) -> bool:
    return any(sign in pattern for sign in "*?[")


def _meets(name: str, pattern: str) -> bool:
    if "|" in pattern:
        return any(_meets(name, one) for one in pattern.split("|"))
    if _is_wild(pattern):
        return fnmatchcase(name, pattern)
    return f".{name}".endswith(f".{pattern}")


def _nothing(pattern: str, names: list[str], argument: str) -> str:
    if not names:
        return f"{argument}={pattern!r} meets nothing: there are no names to meet."
    spans: dict[str, list[str]] = {}  # each run of parts, to the names that hold it
    for name in names:
        parts = name.split(".")
        for start in range(len(parts)):
            for end in range(start + 1, len(parts) + 1):
                spans.setdefault(".".join(parts[start:end]), []).append(name)
    core = pattern.strip("*?.")
    near = [name for name in names if core and core in name]
    near += [name for span in get_close_matches(core, spans, n=5, cutoff=0.6) for name in spans[span]]
    near = list(dict.fromkeys(near or names))
    shown = ", ".join(near[:4]) + (f" and {len(near) - 4} more" if len(near) > 4 else "")
    kind = "Near it" if len(near) < len(names) else "There"
    return f"{argument}={pattern!r} meets no name. {kind} {'is' if len(near) == 1 else 'are'} {shown}."
