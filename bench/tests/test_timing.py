"""Parts of a step, timed in turn."""

import json

import pytest
import torch
from eke_bench import Timing, cli, tables


def timing(**options):
    big, small = torch.randn(2, 300, 300)
    functions = {"product": lambda: big @ big, "nothing": lambda: None}
    return Timing("quick", "One Product", lambda size: functions, **options)


def test_each_gets_its_time_and_its_ratio_and_the_first_is_its_own_control():
    summary = timing().measure("smoke")
    assert list(summary["timing"]) == ["product", "nothing", "product (again)"]
    assert summary["timing"]["nothing"]["ratio"][0] < 0.5
    assert summary["timing"]["product"]["ratio"] == [1.0, 1.0, 1.0]


def test_facts_and_headline_are_those_of_the_author():
    one = timing(
        facts=lambda label, function, size: {"letters": len(label)},
        headline=lambda summary: f"{summary['timing']['nothing']['facts']['letters']} letters",
    )
    summary = one.measure("smoke")
    assert summary["headline"] == "7 letters"
    head, first, *_, again = tables.timing.grid(summary)
    assert head == ["One Product", "ms", "ratio", "95 %", "letters"]
    assert first[-1] == "7"
    assert again[-1] == "-"  # the control is the first one again


def test_a_headline_is_a_text_with_the_ratio_of_each_function():
    summary = timing(headline="{0:.0f} and {1:.1f}").measure("smoke")
    assert summary["headline"] == f"1 and {summary['timing']['nothing']['ratio'][0]:.1f}"


def test_nothing_to_time_is_said_and_no_traceback(tmp_path, capsys):
    one = Timing("quick", "One Product", lambda size: {})
    assert cli.main_of(one, arguments=["--out", str(tmp_path)]) == 2
    assert "One Product: nothing to time here." in capsys.readouterr().err


def test_the_threads_of_torch_are_given_back():
    before = torch.get_num_threads()
    timing().measure("smoke")
    assert torch.get_num_threads() == before


def test_a_script_stores_and_shows_it(tmp_path, capsys):
    assert cli.main_of(timing(), arguments=["--out", str(tmp_path), "--only", "timings"]) == 0
    stored = json.loads((tmp_path / "quick-one-product-smoke.json").read_text())
    assert stored["rounds"] == 4
    assert cli.main_of(timing(), arguments=["--out", str(tmp_path), "--only", "timings", "--show"]) == 0
    assert capsys.readouterr().out.count("One Product") == 2


@pytest.mark.parametrize("size", ["smoke", "cpu"])
def test_rounds_are_few_only_at_the_size_that_says_nothing(size):
    assert timing(rounds=9).measure(size)["rounds"] == (4 if size == "smoke" else 9)
