"""Columns on a terminal and in a pipe."""

from eke.cli import columns

LINES = [("name", "what it does"), ("one", "a sentence of some words"), ("two", "short")]


def test_in_a_pipe_a_line_stays_a_line():
    assert columns.table(LINES, None, shrink=(1,)).splitlines() == [
        "name  what it does",
        "one   a sentence of some words",
        "two   short",
    ]


def test_on_a_terminal_the_last_column_wraps_below_itself():
    assert columns.table(LINES, 27, shrink=(1,)).splitlines() == [
        "name  what it does",
        "one   a sentence of some",
        "      words",
        "two   short",
    ]


def test_two_columns_share_what_is_left_and_one_that_needs_less_leaves_the_rest():
    found = columns.table([("x", "a " * 40, "b")], 60, shrink=(2, 1))
    assert max(map(len, found.splitlines())) <= 60
    assert len(found.splitlines()) == 2


def test_no_column_gets_narrower_than_twenty():
    found = columns.table([("name", "word " * 12)], 10, shrink=(1,))
    assert max(map(len, found.splitlines())) == 6 + 19
