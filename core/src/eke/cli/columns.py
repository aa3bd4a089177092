"""Columns of text that fit a terminal. In a pipe a line stays a line, for grep, unless COLUMNS is set."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from typing import TextIO


def width(stream: TextIO | None = None) -> int | None:
    """Characters in a line of ``stream``, by default stdout: of its terminal, or what COLUMNS says; None where there is
    neither."""
    terminal = (stream or sys.stdout).isatty() or os.environ.get("COLUMNS")
    return shutil.get_terminal_size().columns if terminal else None


def paragraph(text: str, within: int | None, hang: int = 0) -> str:
    """``text`` in lines of at most ``within`` characters, all but the first ``hang`` to the right. A word stays whole,
    however long: it may be a path or a name to copy."""
    if within is None:
        return text
    return textwrap.fill(
        text,
        max(within, hang + 20),
        subsequent_indent=" " * hang,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )


def table(lines: list[tuple[str, ...]], within: int | None, shrink: tuple[int, ...]) -> str:
    """Aligned columns; those in ``shrink`` share what the others leave of ``within`` characters and wrap."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    if within is not None:
        left = within - sum(wide for number, wide in enumerate(widths) if number not in shrink) - 2 * (len(widths) - 1)
        for rank, number in enumerate(shrink):
            share = max(20, left // (len(shrink) - rank))
            widths[number] = min(widths[number], share)
            left -= widths[number]
    return "\n".join(_row(line, widths) for line in lines)


def _row(line: tuple[str, ...], widths: list[int]) -> str:
    cells = [
        textwrap.wrap(cell, max(1, wide), break_on_hyphens=False) or [""]
        for cell, wide in zip(line, widths, strict=True)
    ]
    rows = [
        "  ".join(
            (cell[number] if number < len(cell) else "").ljust(wide) for cell, wide in zip(cells, widths, strict=True)
        )
        for number in range(max(map(len, cells)))
    ]
    return "\n".join(row.rstrip() for row in rows)
