"""What the tests of a distribution can depend on, as one number: while it stays, they need not run again.

It holds the distribution's folder, the core and the kit, other distributions of the checkout that its files name, the
versions of what it requires, step by step, of Python, and the processor's instructions. Imports nothing heavy.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

import eke
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = ("test", "")
INSTRUCTIONS = ("sse", "ssse", "avx", "amx", "fma", "f16c", "asimd", "sve", "bf16", "i8mm")
LEFT_OUT = ("__pycache__", ".pytest_cache", ".ruff_cache", "dist", "build")


def certified(root: Path) -> dict[Path, dict[str, Any]]:
    """Test folders of the checkout whose distribution is as it was when all of them passed, to its certificate."""
    found = {}
    for pattern in ("src/*/certificate.json", "*/*/src/*/certificate.json"):
        for file in sorted(root.glob(pattern)):
            folder = file.parents[2]
            content = json.loads(file.read_text(encoding="utf-8"))
            if content.get("content") and content["content"] == fingerprint(folder):
                found[folder / "tests"] = content
    return found


def fingerprint(folder: Path) -> str:
    """Of a distribution's folder in a checkout, and all that its tests run on."""
    known = _neighbours(folder)
    whole, todo = {folder}, [folder]
    while todo:
        for other in named(todo.pop()) & set(known):
            if known[other] not in whole:
                whole.add(known[other])
                todo.append(known[other])
    places = [(place.name, place) for place in sorted(whole)]
    places += [(f"eke {number}", Path(place)) for number, place in enumerate(sorted(eke.__path__))]
    digest = hashlib.sha256()
    for label, place in places:
        for file in files(place):
            digest.update(f"{label}/{file.relative_to(place)}\n".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    for line in (*versions([place.name for place in sorted(whole)]), platform.python_version(), *processor()):
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def files(place: Path) -> Iterator[Path]:
    """All files of a folder but texts for people, certificates and what tools leave behind."""
    for file in sorted(place.rglob("*")):
        inside = file.relative_to(place).parts
        if any(part in LEFT_OUT or part.endswith(".egg-info") for part in inside):
            continue
        written = re.fullmatch(r"(certificate|zoo).*\.json", file.name)  # by a run that passed
        if file.is_file() and file.suffix not in (".md", ".pyc") and not written:
            yield file


def named(folder: Path) -> set[str]:
    """The packages of Eke's that a distribution's modules and tests name anywhere, its own included."""
    code = (file for part in ("src", "tests") for file in files(folder / part) if file.suffix == ".py")
    texts = (file.read_text(encoding="utf-8", errors="replace") for file in code)
    return {word for text in texts for word in re.findall(r"\beke_[a-z0-9_]+", text)}


def versions(names: list[str]) -> list[str]:
    """``name version`` of what these distributions require, and of what that requires, as far as it is installed."""
    installed = {canonicalize_name(one.name): one for one in distributions() if one.name}
    todo = [*names, "eke", "eke-testing", "eke-forecast", "torch", "lightning", "transformers", "pytest"]
    seen: dict[str, str] = {}
    while todo:
        name = canonicalize_name(todo.pop())
        if name in seen or name not in installed:
            continue
        one = installed[name]
        seen[name] = one.version
        todo += _required(one, EXTRAS if name.startswith("eke") else ("",))
    return [f"{name} {version}" for name, version in sorted(seen.items())]


def processor() -> list[str]:
    """The machine's kind and, where Linux tells them, its maker and the instructions by which kernels are chosen. Not
    all flags: of these a virtual machine or a new Linux shows others on the same processor."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    maker = re.search(r"^(?:vendor_id|CPU implementer)\s*:\s*(.*)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    chosen = sorted(flag for flag in flags[1].split() if flag.startswith(INSTRUCTIONS)) if flags else []
    return [platform.system(), platform.machine(), maker[1] if maker else platform.processor(), " ".join(chosen)]


def _neighbours(folder: Path) -> dict[str, Path]:
    """Package to folder, of the checkout's distributions."""
    root = folder.parents[1] if len(folder.parents) > 1 else folder
    places = [*root.glob("*/*/src/eke_*"), *root.glob("*/src/eke_*")]
    return {place.name: place.parents[1] for place in places if place.is_dir()}


def _required(one: Distribution, extras: tuple[str, ...]) -> list[str]:
    requirements = [Requirement(text) for text in one.requires or []]
    return [
        each.name
        for each in requirements
        if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in extras)
    ]
