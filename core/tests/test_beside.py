"""Lightning's callbacks beside techniques: refused by name at the start, or working."""

import subprocess
import sys

import eke
import pytest
from eke import beside
from eke.testing import TinyBlocks, assert_same, fit
from lightning.pytorch import callbacks as lightning

GROWS = eke.Technique(name="grows", kind="callback", effects=("replaces module tree",))
ADAPTS = eke.Technique(name="adapts", kind="callback", effects=("changes module tree", "replaces requires_grad"))
CHOOSES = eke.Technique(name="chooses", kind="callback", effects=("replaces samples", "changes learning rate"))
SPARSE = eke.Technique(name="sparse", kind="callback", effects=("changes weights",))
SHARDS = eke.Technique(name="shards", kind="strategy", effects=("replaces sharding",))
HARMLESS = eke.Technique(name="harmless", kind="callback", effects=("changes batch", "reads weights", "changes loss"))


class MyEMA(lightning.EMAWeightAveraging):
    pass


@pytest.mark.parametrize(
    ("callback", "refused"),
    [
        (lightning.EMAWeightAveraging, {"grows", "adapts", "shards"}),
        (MyEMA, {"grows", "adapts", "shards"}),
        (lambda: lightning.StochasticWeightAveraging(0.1), {"grows", "adapts", "chooses", "shards"}),
        (lightning.BackboneFinetuning, {"grows", "adapts", "shards"}),
        (lambda: lightning.ModelPruning("l1_unstructured"), {"grows", "adapts", "sparse", "shards"}),
        (lightning.EarlyStopping, set()),
    ],
)
def test_each_callback_refuses_those_that_it_cannot_follow(callback, refused):
    built = lightning.EarlyStopping("loss") if callback is lightning.EarlyStopping else callback()
    for record in (GROWS, ADAPTS, CHOOSES, SPARSE, SHARDS, HARMLESS):
        found = beside.refusals([built], [record])
        assert bool(found) == (record.name in refused), (record.name, found)
        assert all(f"'{record.name}' cannot run beside Lightning's {type(built).__name__}: " in one for one in found)
        assert all(one.endswith(".") and "Leave it out" in one for one in found)


def test_every_refusal_is_in_the_one_error():
    with pytest.raises(eke.ConflictError) as error:
        beside.check([MyEMA(), lightning.BackboneFinetuning()], [GROWS, HARMLESS])
    assert "MyEMA: it copies the module" in str(error.value)
    assert "BackboneFinetuning: it freezes modules" in str(error.value)
    beside.check([MyEMA()], [HARMLESS])


def test_a_class_of_the_same_name_that_is_not_lightnings_is_passed_over():
    own = type("WeightAveraging", (), {})()
    assert beside.refusals([own], [GROWS]) == []


def test_faults_of_lightnings_own_are_said():
    (said,) = beside.notes([lightning.BackboneFinetuning(), lightning.EMAWeightAveraging()])
    assert "BackboneFinetuning: after a resume, what it has unfrozen is frozen again" in said


def test_effects_and_resources_are_words_of_the_vocabulary():
    for one in beside.CALLBACKS:
        eke.Technique(name="x", kind="callback", effects=(*one.effects, *(f"changes {word}" for word in one.refuses)))
        assert getattr(lightning, one.name, None) or one.name in ("WeightAveraging",)


def test_it_imports_neither_torch_nor_lightning():
    code = "import sys, eke.beside; print(sorted({'torch', 'lightning'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


class Idle(eke.TechniqueCallback):
    technique = eke.Technique(name="idle", kind="callback", effects=("reads loss",))


def test_an_average_of_lightnings_runs_beside_a_technique_that_it_bears():
    alone = fit(TinyBlocks(), callbacks=[MyEMA()], validate=True)
    both = fit(TinyBlocks(), Idle(), callbacks=[MyEMA()], validate=True)
    assert_same(alone.state["weights"], both.state["weights"], "weights beside Lightning's average, then with Eke too")
