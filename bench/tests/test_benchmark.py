"""What is trained for a comparison, and what is concluded, on results made up by hand."""

import json
import math
from pathlib import Path

import pytest
from eke import EkeError
from eke_bench import Benchmark, analysis, benchmark, tables
from eke_bench.cli import composition
from eke_bench.runner import Runner
from eke_bench.store import Run, record
from eke_bench.workloads import load

SIZE = load("gpt", "smoke").size
BEST = 8e-3


class Imagined(Runner):
    """Results from a formula in place of training: loss and cost of a run follow from what it is.

    A step costs 0.5 a block. Loss falls with the logarithm of steps and is lowest at a learning rate of 8e-3.
    """

    def __init__(self, gain=0.0, step=1.0, smaller=0.0, best=BEST, noise=0.01, failing=()):
        super().__init__("nowhere", say=lambda text: None)
        self.gain, self.step, self.smaller, self.best, self.noise = gain, step, smaller, best, noise
        self.failing, self.trained = failing, []

    def __call__(self, runs):
        runs = list(runs)
        self.trained += runs
        return [self.result(run) for run in runs]

    def result(self, run):
        if any(name in run.recipe for name in self.failing):
            return record(run, {"error": "RuntimeError: no memory"}, "failed")
        loss = 4 - 0.5 * math.log(run.steps) + abs(math.log2(run.lr / self.best)) * 0.1
        loss += self.noise * ((run.seed * 7919 + 13) % 11 - 5) / 5  # the seed's own luck
        cost = 0.5 * run.shape["blocks"]
        if run.recipe:
            loss, cost = loss - self.gain, cost * self.step
        if run.shape["blocks"] == 1:
            loss -= self.smaller
        costs = {
            "steps": run.steps,
            "normalized_cost": cost * run.steps * (1.003 if run.again or run.seed >= 100 else 1.0),
            "wall_s": run.steps * 0.1,
            "cpu_s": run.steps * 0.1,
            "flops": None,
            "energy_j": None,
            "first_step_s": 0.1,
            "memory": {"total": 2**20},
        }
        return record(run, {"final": {"val_loss": loss}, "costs": costs})


def conclude(runner, claim="changed algorithm", seeds=3, **options):
    one = Benchmark("quick", {"quick": {"quick": {}}}, claim=claim, **options)
    results = benchmark.measure(one, "smoke", runner, seeds)
    return analysis.summarize(one, "smoke", results)


def test_the_learning_rate_is_the_best_of_the_sweep_and_lies_inside_it():
    run = Run("gpt", "smoke", dict(SIZE.shape), 24, 0.0)
    for best in (4e-3, 8e-3, 16e-3, 32e-3, 1e-3):  # the last two lie beyond the ends
        runner = Imagined(best=best)
        assert benchmark.tune(run, SIZE.lrs, runner) == pytest.approx(best)
        tried = {one.lr for one in runner.trained}
        assert min(tried) < best < max(tried)


def test_a_baseline_that_never_trains_is_an_error_with_its_reason():
    class Broken(Imagined):
        def result(self, run):
            return record(run, {"error": "RuntimeError: no memory"}, "failed")

    with pytest.raises(EkeError, match="cannot be trained at any learning rate: RuntimeError: no memory"):
        benchmark.tune(Run("gpt", "smoke", dict(SIZE.shape), 24, 0.0), SIZE.lrs, Broken())


def test_a_comparison_holds_every_run_that_fairness_asks_for():
    runner = Imagined(step=0.5)
    rows = conclude(runner)["rows"]
    assert list(rows) == [
        "baseline",
        "baseline, 1/2",
        "baseline, 1/3",
        "A/A",
        "quick",
        "plain, same cost",
        "smaller, same cost",
    ]
    assert {row["runs"] for row in rows.values()} == {3}
    assert (rows["baseline"]["steps"], rows["baseline, 1/2"]["steps"], rows["baseline, 1/3"]["steps"]) == (24, 12, 8)
    assert (
        rows["plain, same cost"]["normalized_cost"]
        == rows["smaller, same cost"]["normalized_cost"]
        == rows["quick"]["normalized_cost"]
        == 12
    )
    assert rows["smaller, same cost"]["shape"] == dict(SIZE.smaller)


def test_every_run_has_the_tuned_learning_rate_and_the_same_seeds():
    runner = Imagined(best=16e-3)
    conclude(runner)
    runs = [run for run in runner.trained if run.recipe or run.seed]
    assert {run.lr for run in runs} == {16e-3}
    assert {run.seed for run in runs} == {0, 1, 2, 100, 101, 102}


def test_seeds_are_run_one_after_the_other_so_that_a_stopped_benchmark_has_whole_ones():
    runner = Imagined()
    conclude(runner)
    seeds = [run.seed % 100 for run in runner.trained if run.recipe or run.seed >= 100]
    assert seeds == sorted(seeds)


def test_a_technique_that_is_cheaper_and_as_good_pays():
    found = conclude(Imagined(step=0.5, smaller=-1.0))
    row = found["rows"]["quick"]
    assert found["verdict"] == "pays"
    assert row["step_ratio"][0] == pytest.approx(0.5)
    assert row["cost_at_quality"] == pytest.approx([0.5, 0.5, 0.5])
    # half the cost buys the plain model 0.5 ln 2 less
    assert row["gain_interval"][0] == pytest.approx(0.5 * math.log(2))


def test_a_smaller_model_that_is_better_is_said_to_be():
    found = conclude(Imagined(step=0.5, smaller=1.0))
    assert found["verdict"] == "pays where the architecture is given; a smaller plain model is better for the same cost"


def test_a_technique_that_only_costs_does_not_pay():
    assert conclude(Imagined(gain=-0.3)).get("verdict") == "does not pay: the plain model is better for the same cost"


def test_a_gain_within_the_noise_is_no_significant_difference():
    found = conclude(Imagined(gain=0.005, noise=0.1))
    assert found["verdict"].startswith("no significant difference at equal compute")
    assert tables._gain(found["rows"]["quick"]).startswith("~")


def test_a_technique_that_costs_more_is_held_against_a_longer_plain_run():
    found = conclude(Imagined(step=2.0, gain=1.0))
    assert found["rows"]["plain, same cost"]["steps"] == 48
    assert found["rows"]["quick"]["gain_interval"][0] == pytest.approx(1.0 - 0.5 * math.log(2))
    assert found["verdict"] == "pays"


def test_better_than_the_whole_curve_is_a_bound_and_no_extrapolation():
    row = conclude(Imagined(gain=0.2))["rows"]["quick"]
    assert tables._bound(row["cost_at_quality"]) == "< 1.00"


@pytest.mark.parametrize("unknown", [1, 3])
def test_a_cost_that_is_not_known_is_left_out_and_said_where_none_is(unknown):
    class Holes(Imagined):
        def result(self, run):
            found = super().result(run)
            if run.recipe and run.seed < unknown:
                found["costs"]["normalized_cost"] = None
            return found

    found = conclude(Holes(step=0.5, smaller=-1.0))
    if unknown == 3:
        assert found["verdict"].startswith("not comparable: too few of its steps of each kind were timed")
        assert tables.grid(found, tables.COSTS)
    else:
        assert found["rows"]["quick"]["normalized_cost"] == 12
        assert len(found["rows"]["quick"]["gain_at_cost"]) == 2


def test_a_failed_technique_is_a_hole_with_its_reason():
    found = conclude(Imagined(failing=["quick"]))
    assert found["rows"]["quick"]["status"] == "failed"
    assert found["verdict"] == "failed: RuntimeError: no memory"
    assert "quick: failed: RuntimeError: no memory" in tables.notes(found)


def test_the_same_mathematics_is_equal_losses_and_the_cost_of_a_step():
    found = conclude(Imagined(step=0.8), claim="same mathematics")
    assert list(found["rows"]) == ["baseline", "A/A", "quick"]
    assert found["verdict"] == "same losses; a step costs 0.80 of the plain one"


def test_a_claim_of_the_same_mathematics_that_is_wrong_is_said_to_be():
    found = conclude(Imagined(gain=0.01), claim="same mathematics")
    assert found["verdict"].startswith("not the same mathematics here: losses differ by up to")


@pytest.mark.parametrize(
    ("gain", "said"),
    [(0.0, "no significant difference in quality"), (-0.3, "quality worse by 0.300"), (0.3, "quality better by 0.300")],
)
def test_a_claim_of_less_memory_is_memory_time_and_quality(gain, said):
    found = conclude(Imagined(gain=gain, step=1.3, noise=0.0 if gain else 0.01), claim="less memory")
    assert list(found["rows"]) == ["baseline", "A/A", "quick"]
    assert found["verdict"] == f"a step takes 1.00 of the peak memory and 1.30 of its time; {said}"


def test_two_in_a_hundred_are_never_significant():
    found = conclude(Imagined(step=0.985), claim="same mathematics")
    assert found["verdict"] == "same losses; no significant difference in the cost of a step"


def test_summaries_are_plain_data():
    found = conclude(Imagined())
    assert json.loads(json.dumps(found)) == found


def test_the_terminals_tables_hold_a_row_a_run_and_fit_into_eighty_columns(capsys):
    tables.show(conclude(Imagined(step=0.5)))
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for label in ("baseline", "A/A", "quick", "plain, same cost", "smaller, same cost"):
        assert text.count(f"\n {label} ") == 2


@pytest.mark.parametrize(
    ("options", "shape", "smaller"),
    [
        ({}, SIZE.shape, SIZE.smaller),
        ({"shape": "deep"}, SIZE.deep, {**SIZE.deep, "blocks": SIZE.deep["blocks"] // 2}),
        ({"shape": "deep", "smaller": "reference"}, SIZE.deep, SIZE.smaller),
        ({"shape": {"smoke": {"blocks": 6, "width": 32}}}, {"blocks": 6, "width": 32}, SIZE.smaller),
        ({"shape": {"gpu": {"blocks": 6, "width": 32}}}, SIZE.shape, SIZE.smaller),
    ],
)
def test_the_model_and_its_control_have_the_shapes_that_are_asked_for(options, shape, smaller):
    rows = conclude(Imagined(), **options)
    assert rows["rows"]["quick"]["shape"] == dict(shape)
    assert rows["rows"]["smaller, same cost"]["shape"] == dict(smaller)
    assert rows["fixed_architecture"] == (dict(shape) != dict(SIZE.shape))


def test_a_workload_without_a_deep_model_says_so():
    with pytest.raises(ValueError, match="finetune has no deep model. Give shape="):
        Benchmark("quick", {"quick": {}}, "finetune", shape="deep").shapes("smoke")


def test_what_runs_need_is_made_in_the_scripts_folder_before_the_first_and_not_to_show_results(tmp_path):
    seen, here = [], Path.cwd()

    class Watching(Imagined):
        def __call__(self, runs):
            seen.append(("run", Path.cwd()))
            return super().__call__(runs)

    def prepare(size):
        seen.append((size, Path.cwd()))

    one = Benchmark("quick", {"quick": {"quick": {}}}, prepare=prepare, folder=tmp_path)
    runner = Watching()
    benchmark.measure(one, "smoke", runner, 1)
    assert seen[:2] == [("smoke", tmp_path), ("run", tmp_path)]
    assert Path.cwd() == here
    seen.clear()
    runner.train = False
    benchmark.measure(one, "smoke", runner, 1)
    assert {what for what, _ in seen} == {"run"}


@pytest.mark.parametrize(("step", "said"), [(1.0, "no significant difference in time or"), (1.3, "1.30 of its")])
def test_memory_that_is_not_known_is_said_to_be(step, said):
    class Uncounted(Imagined):
        def result(self, run):
            found = super().result(run)
            found["costs"]["memory"] = None
            return found

    verdict = conclude(Uncounted(step=step), claim="less memory")["verdict"]
    assert "memory not known" in verdict
    assert said in verdict


def test_a_ladder_adds_one_technique_at_a_time_and_leaves_each_out():
    recipe = {"a": {}, "b": {"x": 1}, "c": {}}
    found = composition(recipe, "gpt").variants
    assert {label: list(one) for label, one in found.items()} == {
        "a + b + c": ["a", "b", "c"],
        "a": ["a"],
        "a + b": ["a", "b"],
        "without a": ["b", "c"],
        "without b": ["a", "c"],
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"variants": {}}, "quick compares nothing"),
        ({"variants": {"a": {}}, "claim": "faster"}, "claim='faster' is none of"),
    ],
)
def test_a_comparison_of_nothing_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        Benchmark("quick", **arguments)


def test_the_plain_model_may_be_trained_by_another_and_techniques_never_are():
    runner = Imagined()
    one = Benchmark("who", {"Lightning": {}}, claim="same mathematics", baseline="hand", subjects={"others": "hf"})
    benchmark.measure(one, "smoke", runner, 1)
    plan = {(run.subject, run.again) for run in runner.trained[len(SIZE.lrs) :]}
    assert plan == {("hand", 0), ("hand", 1), ("lightning", 0), ("hf", 0)}


def test_rounding_that_grows_is_told_from_other_mathematics():
    class Rounds(Imagined):
        def result(self, run):
            found = super().result(run)
            found["final"]["val_loss"] += (0.002, -0.003, 0.001)[run.seed % 100] if run.recipe else 0.0
            return found

    found = conclude(Rounds(noise=0.05), claim="same mathematics")
    assert found["verdict"].startswith("losses apart by up to 0.003, as rounding grows; no significant difference")
