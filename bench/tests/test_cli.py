"""The command, from training to the picture, at the size that takes seconds."""

import json
from pathlib import Path

import pytest
from eke_bench import Benchmark, cli, runner
from eke_bench.runner import Runner
from eke_bench.store import Run, Store


def run(*words):
    return cli.main(["run", *words])


pytestmark = pytest.mark.xdist_group("bench command")  # one run serves them all


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    pytest.importorskip("eke_stacking")  # any technique would do
    folder = tmp_path_factory.mktemp("results")
    assert run("stacking:stages=[0.5]", "--out", str(folder)) == 0
    return folder


def test_a_comparison_leaves_results_a_summary_and_a_picture(measured):
    assert sorted(path.name for path in measured.iterdir()) == [
        "gpt-smoke.jsonl",
        "stacking-gpt-smoke.json",
        "stacking-gpt-smoke.png",
    ]
    assert (measured / "stacking-gpt-smoke.png").read_bytes()[:4] == b"\x89PNG"


def test_half_depth_for_half_of_the_run_is_in_the_flops(measured):
    records = Store(measured, "gpt", "smoke").records()
    plain = next(one for one in records if one["run"]["steps"] == 24 and not one["run"]["recipe"])
    grown = next(one for one in records if one["run"]["recipe"])
    half, full = grown["kinds"]["1 of 2 blocks, 4x33"], grown["kinds"]["2 of 2 blocks, 4x33"]
    assert half["steps"] == full["steps"] == 12
    assert full["flops"] == plain["costs"]["flops"] / 24
    assert grown["costs"]["flops"] == 12 * (half["flops"] + full["flops"])
    # 4 windows of 32 bytes, one block less: 12 width^2 weights and its attention
    assert full["flops"] - half["flops"] == 4 * 32 * (6 * 12 * 32**2 + 12 * 32 * 32)


def test_what_is_stored_is_not_trained_again(measured, monkeypatch, capsys):
    before = (measured / "gpt-smoke.jsonl").read_bytes()
    monkeypatch.setattr(runner, "train", lambda run: pytest.fail("it trained"))
    assert run("stacking:stages=[0.5]", "--out", str(measured)) == 0
    assert (measured / "gpt-smoke.jsonl").read_bytes() == before
    assert "Verdict:" in capsys.readouterr().out


def test_a_benchmark_that_was_killed_goes_on(tmp_path, measured):
    lines = (measured / "gpt-smoke.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "gpt-smoke.jsonl").write_text("".join(lines[:7]) + lines[7][:50])  # killed while it wrote
    assert run("stacking:stages=[0.5]", "--out", str(tmp_path)) == 0
    ids = [json.loads(line)["id"] for line in (tmp_path / "gpt-smoke.jsonl").read_text().splitlines()]
    assert len(set(ids)) == len(ids) >= len(lines) - 4  # the learning rate of the smaller model may fall elsewhere
    assert ids[:7] == [json.loads(line)["id"] for line in lines[:7]]


def test_show_prints_what_is_stored_and_draws_the_profile(measured, tmp_path, capsys):
    for file in measured.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert cli.main(["show", "--out", str(tmp_path)]) == 0
    assert "stacking on gpt" in capsys.readouterr().out
    assert (tmp_path / "profile.png").exists()


def test_the_list_names_workloads_and_subjects(capsys):
    assert cli.main(["list"]) == 0
    text = capsys.readouterr().out
    assert "gpt" in text
    assert "lightning" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stacking", "--workload", "nothing"], "no workload 'nothing'. There are: gpt"),
        (["stacking", "--size", "huge"], "gpt has no size 'huge'. It has: smoke, cpu, gpu."),
        (
            ["stacking", "--shape", "tall"],
            "--shape tall is no shape. Give name=number, as in blocks=8 width=64, or deep.",
        ),
        (["stacking", "--ladder"], "a ladder needs two techniques or more"),
        (["stacking:stages=[0.5]", "--jobs", "0"], "jobs=0 runs nothing. Give 1 or more."),
        (["stacking:height=3"], "unexpected keyword argument 'height'"),
    ],
)
def test_wrong_input_gets_one_line(words, said, tmp_path, capsys):
    pytest.importorskip("eke_stacking")
    assert run(*words, "--out", str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_technique_that_is_not_installed_is_named_before_anything_is_trained(tmp_path, capsys):
    assert run("lion", "--out", str(tmp_path)) == 2
    assert "no technique named 'lion' is installed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_show_without_results_says_what_to_do(tmp_path, capsys):
    assert cli.main(["show", "--out", str(tmp_path)]) == 2
    assert "holds no summary" in capsys.readouterr().err


def test_a_techniques_own_script_is_one_call(measured, capsys):
    own = Benchmark("stacking", {"stacking": {"stacking": {"stages": [0.5]}}})
    assert cli.main_of(own, arguments=["--out", str(measured), "--show"]) == 0
    assert "Verdict:" in capsys.readouterr().out


def test_two_jobs_come_to_the_results_of_one(tmp_path):
    runs = [Run("gpt", "smoke", {"blocks": 1, "width": 32}, 4, 8e-3, seed=seed) for seed in (0, 1)]
    one = Runner(str(tmp_path / "one"), say=lambda text: None)(runs)
    two = Runner(str(tmp_path / "two"), jobs=2, say=lambda text: None)(runs)
    assert [result["final"] for result in one] == [result["final"] for result in two]


def test_a_failure_names_files_by_their_package_and_not_by_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = Path(runner.__file__).parents[1]

    class Failing:
        def fit(self, run, workload, meter):
            raise RuntimeError(f"see {here}/eke_bench/runner.py, {Path.cwd()}/notes.txt and {Path.home()}/data")

    monkeypatch.setattr(runner, "load_subject", lambda name: Failing())
    failed = runner.train(Run("gpt", "smoke", {"blocks": 1, "width": 32}, 4, 8e-3))
    assert failed["error"] == "RuntimeError: see eke_bench/runner.py, notes.txt and data"
    assert 'File "eke_bench/runner.py", line' in failed["trace"]
    assert str(here) not in failed["trace"]


def test_one_runs_failure_is_stored_and_hinders_no_other(tmp_path):
    good = Run("gpt", "smoke", {"blocks": 1, "width": 32}, 4, 8e-3)
    bad = good.but(shape={"blocks": 1, "width": 32, "flavour": 1})
    failed, fine = Runner(str(tmp_path), say=lambda text: None)([bad, good])
    assert (failed["status"], fine["status"]) == ("failed", "ok")
    assert "flavour" in failed["error"]
    assert len(Store(tmp_path, "gpt", "smoke").records()) == 2


def test_the_probe_changes_no_result(tmp_path):
    """Between its steps a run takes steps of another model; it must not notice."""
    with_probes = runner.train(Run("gpt", "smoke", {"blocks": 1, "width": 32}, 8, 8e-3))
    hand = runner.train(Run("gpt", "smoke", {"blocks": 1, "width": 32}, 8, 8e-3, subject="hand"))
    assert with_probes["final"]["val_loss"] == pytest.approx(hand["final"]["val_loss"], rel=1e-6)
