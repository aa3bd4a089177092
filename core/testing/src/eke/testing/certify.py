"""Certificates: on what a technique's contract passed, as a file that ships in its wheel."""

from __future__ import annotations

import datetime
import importlib
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from eke import registry
from eke.cli import certificates
from eke.testing.plugin import EXCEPTED


def certify(outcomes: dict[type, dict[Any, str]]) -> list[str]:
    """Write the certificate of each technique whose contracts have passed whole; say of each what was done.

    Args:
        outcomes: Contract class to pytest item to ``"passed"``, ``"failed"``, ``"not run"`` or the reason of a skip.
    """
    by_technique: dict[str, list[type]] = {}
    lines = []
    for contract in outcomes:
        record = contract().subject().record
        if record is None or record.name not in registry.available():
            lines.append(f"{contract.__name__}: no installed technique, so there is nothing to certify")
        else:
            by_technique.setdefault(record.name, []).append(contract)
    for name, contracts in by_technique.items():
        results = {item: outcome for contract in contracts for item, outcome in outcomes[contract].items()}
        lines.append(f"{name}: {_certify(name, contracts, results)}")
    return lines


def _certify(name: str, contracts: list[type], results: dict[Any, str]) -> str:
    file = _package_folder(name) / certificates.file_name(registry.available()[name])
    open_items = [
        f"{item.name} ({outcome})"
        for item, outcome in results.items()
        if outcome != "passed" and not outcome.startswith(EXCEPTED)
    ]
    absent = [
        test
        for contract in contracts
        for test in contract.items()
        if test not in {item.originalname for item in results if item.cls is contract}
    ]
    if open_items or absent:
        kept = "the old one was left" if file.exists() else "none was written"
        return f"no certificate, {kept}: {', '.join([*open_items, *(f'{test} (not run)' for test in absent)])}"
    file.write_text(json.dumps(certificate(name, contracts, results), indent=2) + "\n", encoding="utf-8")
    return f"certificate written to {file}"


def certificate(name: str, contracts: list[type], results: dict[Any, str]) -> dict[str, Any]:
    """What the file holds: name, date, versions, tests that passed, tests excepted and why, and what was exercised."""
    excepted = {
        item.originalname: outcome.removeprefix(EXCEPTED)
        for item, outcome in results.items()
        if outcome.startswith(EXCEPTED)
    }
    passed = [item for item, outcome in results.items() if outcome == "passed" and item.originalname not in excepted]
    distribution = registry.available()[name].dist
    shapes = {item.callspec.params["shape"].__name__ for item in passed if "shape" in item.fixturenames}
    promised = set.intersection(*({shape.__name__ for shape in contract.shapes} for contract in contracts))
    return {
        "technique": name,
        "date": datetime.date.today().isoformat(),
        "versions": {
            distribution.name: distribution.version,
            **{library: version(library) for library in ("eke", "lightning", "torch")},
        },
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "strategies": _exercised(passed, "strategy"),
        "precisions": _exercised(passed, "precision"),
        "shapes": sorted(shapes & promised),
        "passed": sorted({item.originalname for item in passed}),
        "excepted": dict(sorted(excepted.items())),
    }


def _package_folder(name: str) -> Path:
    package = importlib.import_module(registry.available()[name].module.partition(".")[0])
    return Path(package.__file__).parent


def _exercised(passed: list[Any], what: str) -> list[str]:
    """In the order in which the tests ran, each once."""
    marks = [getattr(item.function, "eke_exercises", {}).get(what) for item in passed]
    return list(dict.fromkeys(mark for mark in marks if mark))
