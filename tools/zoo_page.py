"""Writes docs/zoo.md: what each technique does on each model of the zoo, as its tests found it; with ``--check`` it
only says whether the page is fresh.

The tests write what they found into each package (``python -m pytest --zoo``), as zoo.json beside the certificate.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from eke.testing.zoo import ZOO

REPO = Path(__file__).parents[1]
PAGE = Path("docs", "zoo.md")
SIGNS = {"trains": "●", "refuses": "–", "nothing to do": "○"}

HEAD = """# The zoo

Tiny models as people have them, with data as people have it, and what each technique does on each of them: it trains
for a few steps and does what its README promises there, or refuses in words before the first step. Written by
`make zoo` from what the techniques' tests found; `eke info NAME` shows the same for one technique.

`eke.testing.zoo.ZOO` holds the models: `ZOO["t5"].build(seed)` is a LightningModule and `.loader(seed)` a DataLoader. A
technique of your own meets them by the contract's three lines; `shows` of the contract class holds its promise there.
"""


def main(arguments: list[str]) -> int:
    fresh = page(REPO)
    if arguments == ["--check"]:
        return int((REPO / PAGE).read_text(encoding="utf-8") != fresh)
    (REPO / PAGE).write_text(fresh, encoding="utf-8")
    return 0


def page(repo: Path) -> str:
    found = stored(repo)
    here = [name for name in ZOO if any(name in one["animals"] for one in found.values())]
    models = [("model", "what is special", "what it is, and what is in its batches"), ("---",) * 3]
    models += [(name, ZOO[name].says, ", ".join(ZOO[name].tags)) for name in ZOO]
    matrix = [("", *here), ("---", *[":-:"] * len(here))]
    for technique, one in found.items():
        cells = [SIGNS.get(one["animals"].get(name, {}).get("outcome", ""), "") for name in here]
        matrix.append((f"[{technique}](#{technique})", *cells))
    signs = "● trains, – refuses, ○ says that there is nothing to do, empty: not tried."
    parts = [HEAD, "## Models", _table(models), "## Techniques", signs, _table(matrix)]
    for technique, one in found.items():
        parts += [f"### {technique}", *details(one["animals"])]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def details(animals: dict[str, Any]) -> list[str]:
    """What came of those that train, and the words of each refusal with all models that it is for."""
    trained = {name: cell["words"] for name, cell in animals.items() if cell["outcome"] == "trains"}
    parts = []
    if trained:
        shown = [f"{name}: {words}" if words else name for name, words in trained.items()]
        parts.append(f"Trains {'; '.join(shown) if any(trained.values()) else ', '.join(shown)}.")
    others: dict[tuple[str, str], list[str]] = {}
    for name, cell in animals.items():
        if cell["outcome"] != "trains":
            others.setdefault((cell["outcome"], cell["words"]), []).append(name)
    lines = [f"- {', '.join(names)}: {_plain(words)}" for (_, words), names in others.items()]
    return [*parts, "\n".join(lines)] if lines else parts


def stored(repo: Path) -> dict[str, dict[str, Any]]:
    """What the packages of a checkout hold, by technique."""
    contents = [json.loads(file.read_text(encoding="utf-8")) for file in repo.glob("*/*/src/*/zoo*.json")]
    return {one["technique"]: one for one in sorted(contents, key=lambda one: one["technique"])}


def _plain(words: str) -> str:
    return words.replace("*", r"\*").replace("_", r"\_").replace("<", "&lt;")


def _table(rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
