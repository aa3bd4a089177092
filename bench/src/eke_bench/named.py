"""Runs that are no comparison of recipes, such as a grid: each is kept by its name as soon as it is done."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eke_bench.benchmark import working_in

Found = Mapping[str, Any]


@dataclass(frozen=True)
class Runs:
    """Named runs and the tables made from them.

    Args:
        name: Of the technique.
        title: What is run; part of the file name.
        plan: ``plan(size, seeds)`` gives name to function, which returns plain data. What is stored is not run again.
        tables: ``tables(found, size)`` gives rows of text, header first, one list for each table.
        headline: Makes the sentence for the table of techniques.
        draw: ``draw(found, file)`` draws a picture beside the results.
        seeds: Runs of each kind, where the command line does not say.
        folder: Where the runs look for files: that of the script.
    """

    name: str
    title: str
    plan: Callable[[str, int], Mapping[str, Callable[[], Any]]]
    tables: Callable[[Found, str], list[list[list[str]]]]
    headline: Callable[[Found, str], str] | None = None
    draw: Callable[[Found, Path], None] | None = None
    seeds: int = 3
    folder: str | Path = "."

    def file(self, size: str, folder: str | Path) -> Path:
        return Path(folder).resolve() / f"{self.name}-{'-'.join(self.title.lower().split())}-{size}.json"

    def stored(self, size: str, folder: str | Path) -> dict[str, Any]:
        """What has been run so far, by name."""
        file = self.file(size, folder)
        return json.loads(file.read_text())["runs"] if file.exists() else {}

    def measure(
        self, size: str, folder: str | Path, seeds: int | None = None, say: Callable[[str], None] = print
    ) -> dict[str, Any]:
        """Run what is not stored. A script that is killed goes on with the next run."""
        file, found = self.file(size, folder), self.stored(size, folder)
        plan = self.plan(size, seeds or self.seeds)
        todo = [name for name in plan if name not in found]
        file.parent.mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(todo, start=1):
            with working_in(self.folder):
                found[name] = plan[name]()
            self._write(file, found, size, whole=number == len(todo))
            say(f"  {number}/{len(todo)}  {name}")
        return found

    def _write(self, file: Path, found: Found, size: str, whole: bool) -> None:
        kept = {"name": self.name, "runs": found, "torch": torch.__version__}
        if whole and self.headline is not None:
            kept["headline"] = self.headline(found, size)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(kept, indent=1) + "\n")
        part.replace(file)  # whole or not at all
