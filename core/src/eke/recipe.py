"""A recipe: which techniques, with which arguments. Written as words or as YAML; imports neither torch nor lightning.

As words, ``stacking adam8bit:block=256,min_size=[1,2]``; as YAML, a mapping of technique to its arguments::

    stacking:
    adam8bit: {block: 256}
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from eke.registry import canonical
from eke.spec import EkeError


def parse_words(words: list[str]) -> dict[str, dict[str, Any]]:
    """Read ``["stacking", "adam8bit:block=256"]`` as ``{"stacking": {}, "adam8bit": {"block": 256}}``.

    Args:
        words: A technique each: its name, or ``name:key=value,key=value``. Values are YAML: ``1e-3``, ``true``,
            ``[1, 2]``, ``{a: 1}``. Commas inside brackets and quotes belong to the value.

    Raises:
        EkeError: a word of another form, a value that is not YAML, a technique or an argument given twice.
    """
    recipe: dict[str, dict[str, Any]] = {}
    for word in words:
        name, colon, rest = word.partition(":")
        name = canonical(name)
        if not name.isidentifier() or (colon and not rest):
            raise EkeError(f"{word!r} names no technique: write name or name:key=value,key=value.")
        if name in recipe:
            raise EkeError(f"{name!r} is given twice. Give it once.")
        recipe[name] = _arguments(word, rest)
    return recipe


def load(path: str | Path) -> dict[str, dict[str, Any]]:
    """Read a YAML file that maps each technique to its arguments; nothing after the colon takes the defaults.

    Raises:
        EkeError: the file cannot be read, or holds something else.
    """
    return from_mapping(load_yaml(path), str(path))


def load_yaml(path: str | Path) -> dict[Hashable, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        EkeError: the file cannot be read, is not YAML, or holds something else than a mapping.
    """
    try:
        content = read_value(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise EkeError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise EkeError(f"{path} cannot be read: it is not UTF-8 text.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise EkeError(f"{path} is not YAML: {_one_line(error)}") from None
    if not isinstance(content, dict):
        raise EkeError(f"{path} holds {_described(content)}; a mapping of technique to its arguments is needed.")
    return content


def from_mapping(content: dict[Hashable, Any], source: str = "the recipe") -> dict[str, dict[str, Any]]:
    """Check that a mapping is a recipe, and read nothing as ``{}``.

    Raises:
        EkeError: an entry that is not a technique with its arguments by name.
    """
    recipe: dict[str, dict[str, Any]] = {}
    for name, given in content.items():
        arguments = {} if given is None else given
        if (
            not isinstance(name, str)
            or not isinstance(arguments, dict)
            or not all(isinstance(k, str) for k in arguments)
        ):
            raise EkeError(
                f"{source}: {name!r} has {_described(given)}; arguments by name are needed, such as {{block: 256}}."
            )
        if canonical(name) in recipe:
            raise EkeError(f"{source}: {name!r} is given twice. Give it once.")
        recipe[canonical(name)] = arguments
    return recipe


def read_value(text: str) -> Any:
    """Read YAML safely, ``1e-3`` as a number, and refuse a key that is given twice."""
    return yaml.load(text, Loader=_Loader)


def _arguments(word: str, rest: str) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for part in _split(rest):
        key, equals, text = part.partition("=")
        key = key.strip()
        if not equals or not key.isidentifier():
            raise EkeError(f"{word!r}: {part!r} is no argument: write key=value.")
        if key in arguments:
            raise EkeError(f"{word!r}: {key!r} is given twice. Give it once.")
        try:
            arguments[key] = read_value(text)
        except (yaml.YAMLError, ValueError) as error:
            raise EkeError(f"{word!r}: the value of {key!r} is not YAML: {_one_line(error)}") from None
    return arguments


def _split(text: str) -> list[str]:
    """Split at the commas that stand outside brackets and quotes."""
    parts, depth, quote = [""] if text else [], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        if letter == "," and not quote and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-3`` as a word and keeps the last of two equal keys; people mean neither."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key_node.value!r} is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _described(value: Any) -> str:
    return "nothing" if value is None else repr(value)


def _one_line(error: Exception) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    return f"{problem or str(error).splitlines()[0]}{where}."
