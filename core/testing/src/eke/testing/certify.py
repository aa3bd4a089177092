"""Certificates: on what a technique's contract passed, as a file that ships in its wheel."""

from __future__ import annotations

import datetime
import importlib
import json
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from eke import registry
from eke.cli import certificates
from eke.testing.zoo import ZOO

EXCEPTED = "excepted: "  # how the reason of a skip begins that the technique's record declares
NOT_RUN = "not run"
ZOO_LIBRARIES = ("transformers", "timm")


@dataclass
class Row:
    """One test and how it ended; plain values, that go from one process to another.

    Args:
        name: Of the test, with its parameters.
        test: Of the test function.
        folder: Of its file.
        contract: The contract class it belongs to, if it does.
        shape: The kit's model that it trains, if it is one of several.
        exercises: What it says that it exercises, such as ``{"strategy": "ddp"}``.
        zoo: The class, if it is one that meets the zoo.
        came: Of a test in the zoo: technique, animal, outcome and words.
        outcome: ``"passed"``, ``"failed"``, ``"not run"`` or the reason of a skip.
    """

    name: str
    test: str
    folder: str
    contract: str = ""
    shape: str = ""
    exercises: dict[str, str] = field(default_factory=dict)
    zoo: str = ""
    came: dict[str, str] = field(default_factory=dict)
    outcome: str = NOT_RUN

    @property
    def stands(self) -> bool:
        return self.outcome == "passed" or self.outcome.startswith(EXCEPTED)


@dataclass
class Contract:
    """A contract class: the technique it is for, its tests, and the shapes that it promises."""

    technique: str
    tests: list[str]
    shapes: list[str]


@dataclass
class Outcomes:
    """All tests of a session, or of one of its processes."""

    rows: dict[str, Row] = field(default_factory=dict)
    contracts: dict[str, Contract] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    def add(self, plain: dict[str, Any]) -> None:
        """Take in those of another process, which collected the same tests and ran some of them."""
        for key, values in plain["rows"].items():
            row = Row(**values)
            if key not in self.rows or row.outcome != NOT_RUN:
                self.rows[key] = row
        self.contracts.update({key: Contract(**values) for key, values in plain["contracts"].items()})


def contract_of(cls: type) -> Contract:
    """What a certificate has to know of a contract class."""
    record = cls().subject().record
    name = "" if record is None or record.name not in registry.available() else record.name
    return Contract(name, cls.items(), [shape.__name__ for shape in cls.shapes])


def certify(outcomes: Outcomes) -> list[str]:
    """Write the certificate of each technique whose contracts have passed whole; say of each what was done."""
    by_technique: dict[str, list[str]] = {}
    lines = []
    for key, contract in outcomes.contracts.items():
        if contract.technique:
            by_technique.setdefault(contract.technique, []).append(key)
        else:
            name = key.rpartition("::")[2]
            lines.append(f"{name}: no installed technique, so there is nothing to certify")
    return lines + [f"{name}: {_certify(name, keys, outcomes)}" for name, keys in by_technique.items()]


def met(outcomes: Outcomes) -> list[str]:
    """Write what became of each technique in the zoo, where all of it was run; say of each what was done. Where several
    classes try one technique, the first says it."""
    by_class: dict[str, list[Row]] = {}
    for row in outcomes.rows.values():
        if row.zoo:
            by_class.setdefault(row.zoo, []).append(row)
    found: dict[str, dict[str, dict[str, str]]] = {}
    failed: set[str] = set()
    lines = []
    for key, rows in by_class.items():
        if open_rows := [row.name for row in rows if row.outcome != "passed"]:
            failed |= {row.came["technique"] for row in rows if row.came}
            lines.append(f"{key.rpartition('::')[2]}: nothing written of the zoo: {', '.join(open_rows)}")
            continue
        for row in rows:
            cells = found.setdefault(row.came["technique"], {})
            cells.setdefault(row.came["animal"], {part: row.came[part] for part in ("outcome", "words")})
    for name, cells in found.items():
        if name in registry.available() and name not in failed:
            lines.append(f"{name}: what became of it in the zoo written to {_write_zoo(name, cells)}")
    return lines


def _write_zoo(name: str, cells: dict[str, dict[str, str]]) -> Path:
    """Those of models that cannot be built here stay as another machine wrote them."""
    entry = registry.available()[name]
    file = _package_folder(name) / certificates.zoo_file_name(entry)
    before = json.loads(file.read_text(encoding="utf-8"))["animals"] if file.exists() else {}
    together = {animal: {**before, **cells}.get(animal) for animal in ZOO}
    libraries = [one for one in ("eke", "lightning", "torch", *ZOO_LIBRARIES) if _has(one)]
    written = {
        "technique": name,
        "date": datetime.date.today().isoformat(),
        "versions": {entry.dist.name: entry.dist.version, **{one: version(one) for one in libraries}},
        "animals": {animal: cell for animal, cell in together.items() if cell is not None},
    }
    file.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return file


def _has(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


def _certify(name: str, keys: list[str], outcomes: Outcomes) -> str:
    file = _package_folder(name) / certificates.file_name(registry.available()[name])
    rows = [row for row in outcomes.rows.values() if row.contract in keys]
    open_items = [f"{row.name} ({row.outcome})" for row in rows if not row.stands]
    seen = {(row.contract, row.test) for row in rows}
    absent = [
        f"{test} ({NOT_RUN})" for key in keys for test in outcomes.contracts[key].tests if (key, test) not in seen
    ]
    if open_items or absent:
        kept = "the old one was left" if file.exists() else "none was written"
        return f"no certificate, {kept}: {', '.join([*open_items, *absent])}"
    written = certificate(name, [outcomes.contracts[key] for key in keys], rows) | _unchanged(rows, outcomes)
    file.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return f"certificate written to {file}"


def certificate(name: str, contracts: list[Contract], rows: list[Row]) -> dict[str, Any]:
    """What the file holds: name, date, versions, tests that passed, tests excepted and why, and what was exercised."""
    excepted = {row.test: row.outcome.removeprefix(EXCEPTED) for row in rows if row.outcome.startswith(EXCEPTED)}
    passed = [row for row in rows if row.outcome == "passed" and row.test not in excepted]
    distribution = registry.available()[name].dist
    promised = set.intersection(*(set(contract.shapes) for contract in contracts))
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
        "shapes": sorted({row.shape for row in passed if row.shape} & promised),
        "passed": sorted({row.test for row in passed}),
        "excepted": dict(sorted(excepted.items())),
    }


def _unchanged(rows: list[Row], outcomes: Outcomes) -> dict[str, Any]:
    """What lets ``--changed`` leave the whole test folder out, where all of it has passed: its number and its tests."""
    from eke.testing.unchanged import fingerprint

    folders = {row.folder for row in rows}
    every = [row for row in outcomes.rows.values() if row.folder in folders]
    ran = [row for row in every if row.outcome != NOT_RUN]
    place = Path(*folders) if len(folders) == 1 else None
    failed = any(row.outcome.startswith("failed") for row in every)
    if failed or place is None or place.name != "tests" or not (place.parent / "pyproject.toml").exists():
        return {}
    return {"content": fingerprint(place.parent), "tests": len(ran)}


def _package_folder(name: str) -> Path:
    package = importlib.import_module(registry.available()[name].module.partition(".")[0])
    return Path(package.__file__).parent


def _exercised(passed: list[Row], what: str) -> list[str]:
    """In the order in which the tests ran, each once."""
    return list(dict.fromkeys(row.exercises[what] for row in passed if what in row.exercises))
