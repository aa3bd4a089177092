"""Commands that other distributions add to ``eke``: entry points of the group ``eke.commands``.

``bench = "eke_bench.cli:main"`` makes ``eke bench``; the function takes the words after it and returns the exit code.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from eke.spec import EkeError

GROUP = "eke.commands"


def commands() -> dict[str, list[EntryPoint]]:
    """Name to who provides it, which should be one; nothing is loaded."""
    found: dict[str, list[EntryPoint]] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        found.setdefault(point.name, []).append(point)
    return found


def summary(points: list[EntryPoint]) -> str:
    """What the distribution says of itself."""
    metadata = points[0].dist.metadata if points[0].dist is not None else {}
    return (metadata["Summary"] or "").replace("%", "%%")  # argparse formats it


def run(points: list[EntryPoint], words: list[str]) -> int:
    """Load a command and run it.

    Raises:
        EkeError: two distributions provide it, or it does not load.
    """
    names = [point.dist.name if point.dist is not None else point.value for point in points]
    if len(points) > 1:
        raise EkeError(
            f"{len(points)} distributions provide 'eke {points[0].name}': {' and '.join(names)}. Uninstall one."
        )
    try:
        main = points[0].load()
    except Exception as error:  # whatever is wrong with it concerns only those who call it
        raise EkeError(f"{names[0]} is installed but 'eke {points[0].name}' does not load: {error}") from error
    return main(words)
