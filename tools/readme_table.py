"""Writes the table of techniques in README.md; with ``--check`` it only says whether the table is fresh.

What a technique does is its distribution's summary. The measured effect is what its benchmark.py concluded from the
results in benchmarks/, and when not to use it is the first sentence of that section of its own README.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

REPO = Path(__file__).parents[1]
MACHINE = "cpu-2core"
START, END = "<!-- techniques:start -->", "<!-- techniques:end -->"


def main(arguments: list[str]) -> int:
    readme = REPO / "README.md"
    text = readme.read_text(encoding="utf-8")
    fresh = filled(text, table(REPO))
    if arguments == ["--check"]:
        return int(text != fresh)
    readme.write_text(fresh, encoding="utf-8")
    return 0


def filled(text: str, table: str) -> str:
    """``text`` with ``table`` between its two markers."""
    head, start, rest = text.partition(START)
    _, end, tail = rest.partition(END)
    if not start or not end:
        raise SystemExit(f"README.md needs the lines {START} and {END}, in this order.")
    return f"{head}{START}\n{table}\n{END}{tail}"


def table(repo: Path) -> str:
    """One row for each technique of a checkout, by name."""
    kinds = ("callbacks", "plugins", "strategies")
    folders = sorted((file.parent for kind in kinds for file in repo.glob(f"{kind}/*/pyproject.toml")), key=_name)
    rows = [("technique", "what it does", "measured effect", "when not to use it"), ("---",) * 4]
    rows += [row(folder, repo / "benchmarks" / MACHINE) for folder in folders]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def row(folder: Path, results: Path) -> tuple[str, str, str, str]:
    """A technique's cells."""
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    name = folder.name.removeprefix("eke-").replace("-", "_")
    link = f"[{folder.name}]({folder.parent.name}/{folder.name})"
    cells = (project["description"], headlines(results, name), when_not(folder / "README.md"))
    return link, *(cell.replace("|", "\\|") for cell in cells)


def headlines(results: Path, name: str) -> str:
    """What the technique's comparisons and timings concluded."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(results.glob(f"{name}-*-cpu.json"))]
    own = [one for one in found if one.get("name", name) == name]  # a composition begins with its first technique, too
    return "; ".join(one["headline"] for one in own if one.get("headline")) or "not measured yet"


def when_not(readme: Path) -> str:
    """The first sentence of a README's section on when not to use it."""
    section = readme.read_text(encoding="utf-8").partition("## When not to use it\n")[2].partition("\n## ")[0]
    first = re.split(r"\n\s*\n|\n[-*] ", section.strip(), maxsplit=1)[0]  # one paragraph, or one item of a list
    prose = re.sub(r"^[-*] ", "", " ".join(first.split()))
    # A sentence ends before a space and a capital, so that "e.g. this" and "2.5" end none.
    return re.split(r"(?<=[.!?])\s+(?=[A-Z`])", prose, maxsplit=1)[0] or "not said yet"


def _name(folder: Path) -> str:
    return folder.name


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
