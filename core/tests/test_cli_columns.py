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


def test_a_paragraph_fits_its_lines_hang_and_a_name_to_copy_stays_whole():
    text = "REFUSED: a sentence of some words, and eke-layer-drop/src/eke_layer_drop/callback.py"
    assert columns.paragraph(text, None) == text
    lines = columns.paragraph(text, 30, hang=2).splitlines()
    assert lines == ["REFUSED: a sentence of some", "  words, and", "  eke-layer-drop/src/eke_layer_drop/callback.py"]


def test_errors_and_what_check_says_fit_the_terminal(monkeypatch, capsys):
    from eke.__main__ import main
    from eke.cli import check

    monkeypatch.setenv("COLUMNS", "60")
    assert main(["list", "--section", "cooking"]) == 2
    report = check.Report(refusals=["one and another " * 9], here=["fp8 by emulation " * 9], foreign=["word " * 30])
    for text in (capsys.readouterr().err, check.render(report)):
        assert max(map(len, text.splitlines())) <= 60
        assert len(text.splitlines()) > 3
