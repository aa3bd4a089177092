"""Others train the same: equal losses from the same seed, and a hole where one cannot run."""

import pytest
from eke_bench import runner, subjects
from eke_bench.runner import Runner
from eke_bench.store import Run, Store
from eke_bench.workloads import load

SIZE = load("gpt", "smoke").size
RUN = Run("gpt", "smoke", dict(SIZE.shape), SIZE.steps, 8e-3)
HERE = [name for name in subjects.NAMES if subjects.missing(name) is None]


pytestmark = pytest.mark.xdist_group("bench subjects")  # one run serves them all


@pytest.fixture(scope="module")
def results():
    return {name: runner.train(RUN.but(subject=name)) for name in HERE}


@pytest.mark.parametrize("name", HERE)
def test_a_subject_trains_and_tells_the_meter_of_every_step_and_evaluation(name, results):
    result = results[name]
    assert result["status"] == "ok", result.get("trace")
    assert result["costs"]["steps"] == RUN.steps
    assert [point["step"] for point in result["curve"]] == [12, 24]
    assert result["curve"][-1]["val_loss"] == pytest.approx(result["final"]["val_loss"], rel=1e-6)


def test_hugging_faces_trainer_comes_to_the_loss_of_the_loop_by_hand(results):
    if "hf" not in results:
        pytest.skip(f"hf: {subjects.missing('hf')}")
    # Not to the bit: it sums the norm that it clips by in another order.
    assert results["hf"]["final"]["val_loss"] == pytest.approx(results["hand"]["final"]["val_loss"], rel=1e-5)


def test_lightning_trains_to_the_bits_of_the_loop_by_hand():
    longer = RUN.but(steps=120)
    curves = [
        [point["val_loss"] for point in runner.train(longer.but(subject=name))["curve"]]
        for name in ("lightning", "hand")
    ]
    assert curves[0] == pytest.approx(curves[1], rel=1e-7)  # evaluations may average in another order


def test_deepspeed_comes_to_the_loss_of_the_loop_by_hand(results):
    if "deepspeed" not in results:
        pytest.skip(f"deepspeed: {subjects.missing('deepspeed')}")
    assert results["deepspeed"]["final"]["val_loss"] == pytest.approx(results["hand"]["final"]["val_loss"], rel=1e-3)


@pytest.mark.parametrize("name", [name for name in HERE if name != "peft"])
def test_the_same_step_has_the_same_flops(name, results):
    assert results[name]["costs"]["flops"] == results["hand"]["costs"]["flops"]


def test_eight_bits_are_eight_bits(results):
    if "bitsandbytes" not in results:
        pytest.skip(f"bitsandbytes: {subjects.missing('bitsandbytes')}")
    states = {name: results[name]["costs"]["memory"]["optimizer"] for name in ("hand", "bitsandbytes")}
    assert states["bitsandbytes"] < 0.5 * states["hand"]


def test_lora_trains_little_and_skips_the_gradients_of_what_is_frozen(results):
    if "peft" not in results:
        pytest.skip(f"peft: {subjects.missing('peft')}")
    assert results["peft"]["costs"]["flops"] < 0.8 * results["hand"]["costs"]["flops"]
    assert results["peft"]["final"]["val_loss"] > results["hand"]["final"]["val_loss"]  # a frozen random start


def test_a_subject_that_is_not_installed_leaves_a_hole_and_no_stored_number(tmp_path, monkeypatch):
    monkeypatch.setitem(
        subjects.NAMES, "absent", ("eke_bench.subjects.absent:Absent", ("a_package_that_is_not_there",))
    )
    (result,) = Runner(str(tmp_path), say=lambda text: None)([RUN.but(subject="absent")])
    assert result["status"] == "missing"
    assert "a_package_that_is_not_there is not installed" in result["error"]
    assert "final" not in result
    assert not Store(tmp_path, "gpt", "smoke").records()


def test_an_unknown_subject_is_named_with_those_there_are():
    result = runner.train(RUN.but(subject="composter"))
    assert result["status"] == "failed"
    assert "no subject 'composter'. There are: lightning, hand" in result["error"]


@pytest.mark.parametrize("name", [name for name in HERE if name != "lightning"])
def test_others_take_no_techniques_of_ours(name):
    result = runner.train(RUN.but(subject=name, recipe={"stacking": {}}))
    assert "techniques; it was given stacking" in result["error"]
