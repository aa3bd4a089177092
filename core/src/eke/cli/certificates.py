"""Certificates: what a technique's contract tests passed on, as a file in its package, one for each technique."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def read(entry: EntryPoint) -> dict[str, Any] | None:
    """The certificate that a technique's package ships, or None. Finds the package without importing it.

    Raises:
        ValueError: the file is there and holds no JSON object.
    """
    return _read(entry, file_name(entry))


def read_zoo(entry: EntryPoint) -> dict[str, Any] | None:
    """What became of the technique on each model of the zoo of eke-testing, as its package ships it, or None.

    Raises:
        ValueError: as :func:`read`.
    """
    return _read(entry, zoo_file_name(entry))


def _read(entry: EntryPoint, name: str) -> dict[str, Any] | None:
    spec = find_spec(entry.module.partition(".")[0])
    for place in (spec.submodule_search_locations or []) if spec else []:
        file = Path(place) / name
        if file.exists():
            content = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError(f"{file} holds {content!r}, not an object")
            return content if content.get("technique", entry.name) == entry.name else None  # of another one
    return None


def file_name(entry: EntryPoint) -> str:
    """``certificate.json``; with the technique's name where it is not the first of its distribution."""
    return "certificate.json" if entry.module.endswith(".entry") else f"certificate-{entry.name}.json"


def zoo_file_name(entry: EntryPoint) -> str:
    """``zoo.json``, or with the technique's name, likewise."""
    return file_name(entry).replace("certificate", "zoo")


def short(entry: EntryPoint) -> str:
    """The month in which it passed, such as ``2026-11``; ``eke info`` tells the rest."""
    try:
        certificate = read(entry)
    except ValueError:
        return "unreadable"
    if certificate is None:
        return "none"
    return str(certificate.get("date", ""))[:7] or "yes"
