"""Certificates: what a technique's contract tests passed on, as a file in its package."""

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
    spec = find_spec(entry.module.partition(".")[0])
    for place in (spec.submodule_search_locations or []) if spec else []:
        file = Path(place) / "certificate.json"
        if file.exists():
            content = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError(f"{file} holds {content!r}, not an object")
            # A distribution may provide several techniques; the contract was run for the one that the file names.
            return content if content.get("technique", entry.name) == entry.name else None
    return None


def short(entry: EntryPoint) -> str:
    """One line, such as ``passed 2026-11, torch 2.13, lightning 2.6.6: single, ddp; fp32, bf16``."""
    try:
        certificate = read(entry)
    except ValueError:
        return "unreadable"
    if certificate is None:
        return "none"
    versions = certificate.get("versions", {})
    where = [f"passed {str(certificate.get('date', ''))[:7]}".strip()]
    where += [f"{name} {versions[name].partition('+')[0]}" for name in ("torch", "lightning") if name in versions]
    what = [", ".join(certificate[key]) for key in ("strategies", "precisions") if certificate.get(key)]
    return ": ".join(filter(None, [", ".join(where), "; ".join(what)]))
