"""Plain values against annotations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from eke import argtypes


def takes(
    many: Sequence[float] | None,
    count: int,
    share: float,
    stage: Literal[1, 2],
    pair: tuple[int, str],
    settings: dict[str, Any],
    by: Mapping[str, int],
    file: str | Path,
    on: bool,
    score: Callable[[Any], Any],
    open_: Any,
): ...


WANTED = argtypes.of(takes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("many", value) for value in ([0.3], (1, 2), [], None)],
        ("count", 3),
        *[("share", value) for value in (0.5, 1)],
        ("stage", 2),
        ("pair", [1, "a"]),
        ("settings", {"r": 4}),
        ("by", {"a": 1}),
        *[("file", value) for value in ("x", Path("x"))],
        ("on", False),
        *[("score", value) for value in (len, "torch.nn.Linear", 3)],  # who knows
        *[("open_", value) for value in (None, 3, "x")],
    ],
)
def test_what_fits_and_what_cannot_be_told_is_taken(name, value):
    assert argtypes.fits(value, WANTED[name])


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("many", "hello", "a str; a list of floats or None"),
        ("many", ["a"], "a list; a list of floats or None"),
        ("many", 3, "an int; a list of floats or None"),
        ("count", 1.5, "a float; an int"),
        ("count", True, "a bool; an int"),
        ("share", "0.5", "a str; a float"),
        ("stage", 4, "an int; 1 or 2"),
        ("stage", True, "a bool; 1 or 2"),
        ("pair", [1], "a list; a list of 2: an int, a str"),
        ("settings", [1], "a list; a mapping"),
        ("by", None, "None; a mapping"),
        ("on", 1, "an int; a bool"),
    ],
)
def test_what_does_not_fit_is_told_with_what_is_needed(name, value, said):
    assert not argtypes.fits(value, WANTED[name])
    assert f"{argtypes.kind(value)}; {argtypes.written(WANTED[name])}" == said


def test_annotations_that_nobody_can_resolve_say_nothing():
    def unresolved(x: NotThere): ...  # noqa: F821

    assert argtypes.of(unresolved) == {}
    assert argtypes.of(dict) == {}
