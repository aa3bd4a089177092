"""Installs each distribution alone, from its wheel, and runs its tests outside the checkout.

    python tools/isolated.py core plugins/eke-adam8bit

torch and the other dependencies are taken from the environment that runs this. Each distribution gets an environment of
its own, made of links to exactly the distributions that it and its test extra declare, and theirs, step by step: an
import that it does not declare fails.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import time
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).parents[1]
WORK = REPO / ".isolated"
HERE = Path(sysconfig.get_path("purelib"))


def main(folders: list[str]) -> int:
    """Check each distribution; return the number that failed."""
    wheels = {name: wheel for name, wheel in map(build, sorted({"core", "core/testing", "core/forecast", *folders}))}
    failed = [folder for folder in folders if not passes(folder, wheels)]
    print(
        f"{len(folders) - len(failed)} of {len(folders)} stand alone"
        + (f"; not: {', '.join(failed)}" if failed else "")
    )
    return len(failed)


def build(folder: str) -> tuple[str, Path]:
    """Build a distribution's wheel; return the distribution's name and the wheel."""
    place = WORK / "wheels" / folder.replace("/", "-")
    _run("rm", "-rf", place)
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", place, REPO / folder)
    (wheel,) = place.glob("*.whl")
    return canonicalize_name(wheel.name.partition("-")[0]), wheel


def passes(folder: str, wheels: dict[str, Path]) -> bool:
    """Whether a distribution's tests pass where only what it declares is installed."""
    start = time.monotonic()
    name = distribution_of(folder)
    environment = WORK / name
    _run("rm", "-rf", environment)
    _run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    site = Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # The tests need the kit; the core's and the kit's own try the forecast and other techniques where those are there.
    ours = {name, "eke", "eke-testing"}
    for wheel in (wheels[one] for one in ours):
        _run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    installed = next(one for one in Distribution.discover(path=[str(site)]) if canonicalize_name(one.name) == name)
    roots = [Requirement(text) for text in installed.requires or []]
    extras = {"new", "testing"} if name == "eke" else {"test"}
    missing = link(needed(roots, extras, site, ours), site)
    if missing:
        print(f"{folder}: declares {', '.join(missing)}, which this environment does not hold")
        return False
    _run(sys.executable, "-m", "pip", "--python", python, "check")
    tests = REPO / folder / "tests"
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", "--rootdir", tests]
    command += [
        "--tb=short",
        "--show-capture=no",
        "-m",
        "not gpu and not slow",
        "-W",
        "ignore::pytest.PytestUnknownMarkWarning",
        tests,
    ]
    done = subprocess.run(command, cwd=environment, capture_output=True, text=True)
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr.strip()
    print(f"{folder}: {summary} ({time.monotonic() - start:.0f} s in all)", flush=True)
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:])
    return done.returncode == 0


def distribution_of(folder: str) -> str:
    """The distribution that lies in a folder of the checkout."""
    return {"core": "eke"}.get(folder) or "eke-" + Path(folder).name.removeprefix("eke-")


def needed(roots: list[Requirement], extras: set[str], site: Path, ours: set[str]) -> dict[str, Distribution | None]:
    """All distributions that requirements lead to, ours left out; None for one that is not installed here."""
    found: dict[str, Distribution | None] = {}
    asked: set[tuple[str, str]] = set()
    waiting = [(requirement, extras) for requirement in roots]
    while waiting:
        requirement, active = waiting.pop()
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in {"", *active}):
            continue
        name = canonicalize_name(requirement.name)
        if all((name, extra) in asked for extra in {"", *requirement.extras}):
            continue
        asked |= {(name, extra) for extra in {"", *requirement.extras}}
        try:
            if name in ours:
                one = next(d for d in Distribution.discover(path=[str(site)]) if canonicalize_name(d.name) == name)
            else:
                one = found[name] = distribution(name)
        except PackageNotFoundError:
            found[name] = None
            continue
        waiting += [(Requirement(text), set(requirement.extras)) for text in one.requires or []]
    return found


def link(distributions: dict[str, Distribution | None], site: Path) -> list[str]:
    """Put links to the top of each distribution into a site folder; return the names of those that are not there."""
    missing = []
    for name, one in distributions.items():
        if one is None:
            missing.append(name)
            continue
        for top in {file.parts[0] for file in one.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists() and (HERE / top).exists():
                (site / top).symlink_to(HERE / top)
    return missing


def _run(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
