"""``eke list``: what is installed, from metadata alone. Imports neither torch, lightning nor any technique."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path

from eke import registry
from eke.cli import certificates, columns
from eke.spec import KINDS


@dataclass(frozen=True)
class Row:
    """One line of the list."""

    name: str
    version: str
    kind: str
    summary: str
    certificate: str


def rows() -> list[Row]:
    """One row for each installed technique, the broken and the twofold among them."""
    return [_row(name, claims) for name, claims in registry.installed().items()]


def render(found: list[Row]) -> str:
    """A table with aligned columns."""
    if not found:
        return "No technique is installed. Perhaps: pip install eke-stacking"
    lines = [("technique", "version", "kind", "what it does", "certificate"), *map(astuple, found)]
    return columns.table(lines, columns.width(), shrink=(4, 3))


def kind(entry: EntryPoint) -> str:
    """The kind that a distribution names among its keywords, ``keywords = ["eke", "callback"]``."""
    keywords = {word.strip() for word in registry.field(entry, "Keywords").split(",")}
    return next((word for word in KINDS if word in keywords), "")


def missing_module(entry: EntryPoint) -> str:
    """Name the module of an entry point if no file holds it; empty where one does. Imports nothing."""
    package, *inner = entry.module.split(".")
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return package
    if not inner or spec.submodule_search_locations is None:
        return ""
    places = [Path(place, *inner) for place in spec.submodule_search_locations]
    there = any(place.with_suffix(".py").exists() or (place / "__init__.py").exists() for place in places)
    return "" if there else entry.module


def _row(name: str, claims: list[EntryPoint]) -> Row:
    entry = claims[0]
    if len(claims) > 1:
        rivals = " and ".join(sorted(registry.field(claim, "Name") for claim in claims))
        return Row(name, "", "", f"DUPLICATE: {rivals} both provide it; uninstall one of them", "")
    version = registry.field(entry, "Version")
    if missing := missing_module(entry):
        return Row(name, version, kind(entry), f"BROKEN: its module {missing} is not there; install it again", "")
    return Row(name, version, kind(entry), registry.field(entry, "Summary"), certificates.short(entry))
