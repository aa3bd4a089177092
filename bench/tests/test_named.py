"""Runs kept by their name."""

import json
from pathlib import Path

import pytest
from eke_bench import Runs, cli


def squares(calls, **options):
    def plan(size, seeds):
        return {f"{seed} | 2": lambda seed=seed: calls.append(seed) or seed**2 for seed in range(seeds)}

    def tables(found, size):
        return [[["run", "square"], *([name, str(value)] for name, value in found.items())]]

    return Runs("quick", "All Squares", plan, tables, **options)


def test_each_is_stored_when_it_is_done_and_not_run_again(tmp_path):
    calls = []

    def broken(size, seeds):
        return {"0 | 2": lambda: 0, "1 | 2": lambda: 1 / 0}

    with pytest.raises(ZeroDivisionError):
        Runs("quick", "All Squares", broken, lambda found, size: []).measure("smoke", tmp_path, say=calls.append)
    assert json.loads((tmp_path / "quick-all-squares-smoke.json").read_text())["runs"] == {"0 | 2": 0}
    assert squares(calls := []).measure("smoke", tmp_path, say=lambda text: None) == {
        "0 | 2": 0,
        "1 | 2": 1,
        "2 | 2": 4,
    }
    assert calls == [1, 2]


def test_the_headline_is_of_all_runs(tmp_path):
    squares([], headline=lambda found, size: f"{len(found)} squares").measure("smoke", tmp_path, say=lambda text: None)
    assert json.loads((tmp_path / "quick-all-squares-smoke.json").read_text())["headline"] == "3 squares"


def test_a_script_prints_the_table_and_shows_it_again_without_running(tmp_path, capsys):
    drawn = []
    one = squares(calls := [], draw=lambda found, file: drawn.append(file))
    assert cli.main_of(one, arguments=["--out", str(tmp_path), "--seeds", "2"]) == 0
    assert "| 1 | 2 | 1 |" in capsys.readouterr().out
    assert cli.main_of(one, arguments=["--out", str(tmp_path), "--show"]) == 0
    assert "| 1 | 2 | 1 |" in capsys.readouterr().out
    assert calls == [0, 1]
    assert drawn == [tmp_path / "quick-all-squares-smoke.png"] * 2


def test_runs_find_their_files_in_the_scripts_folder(tmp_path):
    (tmp_path / "script").mkdir()
    one = Runs(
        "quick",
        "where",
        lambda size, seeds: {"here": lambda: str(Path.cwd())},
        lambda *_: [],
        folder=tmp_path / "script",
    )
    assert one.measure("smoke", tmp_path, say=lambda text: None) == {"here": str(tmp_path / "script")}
    assert (tmp_path / "quick-where-smoke.json").exists()
