"""Results as lines of JSON, one line a run, only ever appended to. Tables and pictures are made from them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from eke.spec import EkeError

from eke_bench.workloads import load

SCHEMA = "eke-bench/2"


@dataclass(frozen=True)
class Run:
    """Everything that a training run's result follows from, but for the versions of what ran it.

    Args:
        workload: Name, or ``package.module:Class``.
        size: Of the workload.
        shape: Of the model.
        steps: Its budget; the learning rate is zero at its end.
        lr: Highest learning rate.
        seed: Of initial weights and data order.
        subject: Who trains it: ``"lightning"``, or one of the others beside it.
        recipe: Techniques with their arguments.
        again: Numbers the repetitions that serve as A/A control.
    """

    workload: str
    size: str
    shape: dict[str, int]
    steps: int
    lr: float
    seed: int = 0
    subject: str = "lightning"
    recipe: dict[str, dict[str, Any]] = field(default_factory=dict)
    again: int = 0

    def but(self, **changes: Any) -> Run:
        return replace(self, **changes)

    def spec(self) -> dict[str, Any]:
        return asdict(self)

    def id(self) -> str:
        """Names the run, the versions that would make it and what its workload's size means today."""
        text = json.dumps([self.spec(), versions(self), _definition(self.workload, self.size)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def _definition(workload: str, size: str) -> dict[str, Any]:
    """What a size means, but for what only says which runs are made of it."""
    defined = asdict(load(workload, size).size)
    return {name: defined[name] for name in ("batch", "shape", "evaluations", "options")}


def versions(run: Run) -> dict[str, str]:
    """Of the techniques and of torch, to minor: another one may come to another result."""
    return {
        "torch": ".".join(torch.__version__.split(".")[:2]),
        **{name: _version(f"eke-{name.replace('_', '-')}") for name in run.recipe},
    }


class Store:
    """Results of one workload at one size.

    Args:
        folder: Where the file is, or will be.
        workload: Name of the workload.
        size: Its size.
    """

    def __init__(self, folder: str | Path, workload: str, size: str) -> None:
        self.path = Path(folder) / f"{workload.replace(':', '.')}-{size}.jsonl"

    def records(self) -> list[dict[str, Any]]:
        """All results, oldest first. A line cut short by a killed run is left out.

        Raises:
            EkeError: a line in the middle is not a result.
        """
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")
        found = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if record["schema"] != SCHEMA:
                    raise KeyError(record["schema"])
            except (json.JSONDecodeError, KeyError, TypeError):
                if number == len(lines):
                    continue  # no newline behind it: whoever wrote it was stopped
                raise EkeError(
                    f"{self.path}, line {number} is no result of {SCHEMA}. Restore the file, or take the line out."
                ) from None
            found.append(record)
        return found

    def find(self, run: Run) -> dict[str, Any] | None:
        """The newest result of this very run that did not fail."""
        wanted = run.id()
        return next((one for one in reversed(self.records()) if one["id"] == wanted and one["status"] == "ok"), None)

    def append(self, record: dict[str, Any]) -> None:
        """Add a result. Safe beside other writers."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    _drop_last_line(file)
            file.write(json.dumps(record, sort_keys=True).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def record(run: Run, result: dict[str, Any], status: str = "ok") -> dict[str, Any]:
    """A result with what it is the result of."""
    return {
        "schema": SCHEMA,
        "id": run.id(),
        "run": run.spec(),
        "versions": versions(run),
        "status": status,
        "environment": environment(),
        **result,
    }


@cache
def environment() -> dict[str, Any]:
    """Of this process: machine and versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": _version("lightning"),
        "eke": _version("eke"),
        "eke-bench": _version("eke-bench"),
    }


def latest(records: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Id to its newest result, those that failed included if nothing better came after."""
    found: dict[str, dict[str, Any]] = {}
    for one in records:
        if one["status"] == "ok" or one["id"] not in found:
            found[one["id"]] = one
    return found


def _drop_last_line(file: Any) -> None:
    file.seek(0)
    whole = file.read()
    file.truncate(whole.rfind(b"\n") + 1)
    file.seek(0, os.SEEK_END)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "?"
