"""Writes the table of techniques in README.md; with ``--check`` it only says whether the table is fresh.

It is grouped by the survey's sections. What a technique does is its record's sentence, or those of both where a
distribution holds two. The measured effect is what its benchmark.py concluded from the results in benchmarks/, and when
not to use it is the first sentence of that section of its own README.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

from eke import Technique, registry, survey

REPO = Path(__file__).parents[1]
MACHINE = "cpu-2core"
OTHER = "Not in the survey"
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
    """One row for each distribution of a checkout, by name, under the sections of the survey that it belongs to."""
    kinds = ("callbacks", "plugins", "strategies")
    folders = sorted((file.parent for kind in kinds for file in repo.glob(f"{kind}/*/pyproject.toml")), key=_name)
    by_section: dict[str, list[tuple[Path, str]]] = {}
    for folder in folders:
        own, *others = sections(folder)
        by_section.setdefault(own, []).append((folder, ""))
        for other in others:
            by_section.setdefault(other, []).append((folder, own))
    parts = []
    for title in (*survey.SECTIONS, OTHER):
        if title in by_section:
            rows = [("technique", "what it does", "measured effect", "when not to use it"), ("---",) * 4]
            for folder, elsewhere in by_section[title]:
                cells = row(folder, repo / "benchmarks" / MACHINE)
                rows.append((*cells[:2], f"see {elsewhere}", "") if elsewhere else cells)
            lines = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
            topics = survey.SECTIONS.get(title, ())
            inside = f" ({', '.join(topics)})" if len(topics) > 1 else ""
            parts.append(f"**{title}**{inside}\n\n{lines}")
    return "\n\n".join(parts)


def records(folder: Path) -> list[Technique]:
    """The records of a distribution's techniques, read from their files; the first is the one that has its name."""
    points = _project(folder).get("entry-points", {}).get("eke", {})
    first = folder.name.removeprefix("eke-").replace("-", "_")
    files = [
        folder / "src" / f"{points[name].replace('.', '/')}.py" for name in sorted(points, key=lambda n: n != first)
    ]
    return [record for file in files if (record := registry.read_record(file)) is not None]


def sections(folder: Path) -> list[str]:
    """Titles of the survey's sections in which a distribution stands; it has its row in the first."""
    found = [survey.section_of(topic) for record in records(folder) for topic in record.topics]
    return list(dict.fromkeys(found)) or [OTHER]


def row(folder: Path, results: Path) -> tuple[str, str, str, str]:
    """A distribution's cells."""
    name = folder.name.removeprefix("eke-").replace("-", "_")
    link = f"[{folder.name}]({folder.parent.name}/{folder.name})"
    does = "; ".join(record.does for record in records(folder) if record.does) or _project(folder)["description"]
    cells = (does, headlines(results, name), when_not(folder / "README.md"))
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


def _project(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _name(folder: Path) -> str:
    return folder.name


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
