import random

import fuzz_faults  # noqa: F401  # by name in the cases
import pytest
import torch
from eke.testing.fuzz import Case, Outcome, draw_case, script, shrink, try_case
from eke.testing.fuzz.__main__ import main
from eke.testing.fuzz.arguments import draw_arguments
from eke.testing.fuzz.case import WAYS
from eke.testing.fuzz.judge import judge
from eke.testing.fuzz.report import failed, record, table
from eke.testing.fuzz.shrink import NOTHING

NOISE = "faulty:GradientNoise"
SAVES = {
    "steps": {"every": 3, "which": 0.1},
    "epochs": {"every": 1, "which": 0.1},
    "validation": {"every": 1, "which": 0.1},
    "hand": {"hook": "on_train_batch_end", "at": 5},
    "after fit": {"at": 1},
    "exception": {"hook": "on_after_backward", "at": 6},
    "kill": {"hook": "on_before_optimizer_step", "at": 4, "every": 1},
}
BY_HAND = {"way": "hand", **SAVES["hand"]}


@pytest.mark.parametrize("way", WAYS)
def test_a_sound_technique_holds_however_it_is_saved(way):
    outcome = try_case(
        Case(techniques={NOISE: {}}, save={"way": way, **SAVES[way]}, options={"validate": 1, "val_check": 0.5})
    )
    assert outcome.kind == "held", outcome.words


@pytest.mark.parametrize(
    ("technique", "options", "kind"),
    [
        ("faulty:Forgets", {}, "differs: batches"),
        ("faulty:HalvesTheRate", {"schedule": "warmup"}, "differs: batches"),
        ("faulty:FreezesAgain", {}, "differs: batches"),
        ("faulty:KeepsTheStateOfOneProcess", {"processes": 2}, "differs: batches"),
        ("fuzz_faults:DriftsApart", {"processes": 2}, "processes apart"),
        pytest.param("fuzz_faults:TellsByTheHash", {"interpreter": True}, "differs: batches", marks=pytest.mark.slow),
        ("fuzz_faults:CountsWindows", {"accumulate": 2}, "differs: batches"),
        ("fuzz_faults:RefusesLate", {}, "refused in mid-run"),
        ("fuzz_faults:Stumbles", {}, "error"),
        ("fuzz_faults:RefusesAtOnce", {}, "refused"),
    ],
)
def test_each_end_has_its_name(technique, options, kind):
    outcome = try_case(Case(techniques={technique: {}}, save=BY_HAND, options={"epochs": 3, **options}))
    assert outcome.kind == kind, outcome.words


def test_a_failure_is_shrunk_to_the_technique_and_the_option_that_it_takes():
    options = {"accumulate": 2, "clip": 0.1}
    large = Case("TinyViT", {NOISE: {"scale": 0.01}, "fuzz_faults:CountsWindows": {"scale": 0.01}}, options, BY_HAND)

    small, found = shrink(large, try_case(large))
    assert small == Case("TinyBlocks", {"fuzz_faults:CountsWindows": {}}, {"accumulate": 2}, BY_HAND)
    assert found.kind == "differs: batches"


def test_what_fails_without_a_technique_is_shrunk_to_one_that_does_nothing():
    case = Case(techniques={NOISE: {}, "fuzz_faults:Stumbles": {}}, options={"accumulate": 2})

    def as_if_the_core_did_it(case):
        return Outcome("error at the resume")

    assert dict(shrink(case, Outcome("error at the resume"), attempt=as_if_the_core_did_it)[0].techniques) == {
        NOTHING: {}
    }


def test_a_case_that_differs_is_not_shrunk_to_one_that_raises():
    case = Case(techniques={NOISE: {}}, options={"accumulate": 2, "clip": 0.1})
    assert shrink(case, Outcome("differs: weights"), attempt=lambda case: Outcome("error"))[0] == case


def test_the_printed_script_fails_as_the_case_did(capsys):
    case = Case(techniques={"faulty:Forgets": {}}, save=BY_HAND)
    text = script(case, Outcome("differs: batches", "loss is 1.0, then 2.0"), seed=7)
    with pytest.raises(SystemExit):
        exec(compile(text, "found.py", "exec"), {"__name__": "__main__"})
    assert "seed 7" in text
    assert "differs: batches" in capsys.readouterr().out


def test_a_seed_decides_all_of_a_case():
    names = [NOISE, "faulty:Forgets", "fuzz_faults:CountsWindows"]
    first, again = ([draw_case(seed, names) for seed in range(60)] for _ in range(2))
    assert first == again
    assert len({str(case) for case in first}) > 55
    assert {case.save["way"] for case in first} == set(WAYS)


def test_every_case_has_the_techniques_that_are_asked_for():
    assert all("faulty:Forgets" in draw_case(seed, [NOISE], ["faulty:Forgets"]).techniques for seed in range(20))


def test_arguments_are_those_that_the_constructor_takes():
    drawn = [draw_arguments(random.Random(seed), NOISE) for seed in range(40)]
    assert all(set(one) <= {"scale"} for one in drawn)
    assert len({one.get("scale") for one in drawn}) > 2


def state(**changes):
    batches = [{"where": f"epoch 0 batch {number}", "batch": number, "loss": 0.5} for number in range(4)]
    found = {"batches": batches, "validations": [], "weights": {"w": torch.zeros(2)}, "optimizers": []}
    return {**found, **changes}


def test_batches_before_the_checkpoint_are_not_missed_and_those_after_it_are():
    after = state()["batches"]
    assert judge([state()], [state(batches=after[2:])], {"trained": 2, "validated": 0}) == []
    (missing,) = judge([state()], [state(batches=after[2:3])], {"trained": 2, "validated": 0})
    assert "epoch 0 batch 3 and 0 more are missing in the resumed run" in missing
    (twice,) = judge([state()], [state(batches=after[1:])], {"trained": 2, "validated": 0})[:1]
    assert "where is 'epoch 0 batch 2', then 'epoch 0 batch 1'" in twice


def test_a_validation_that_is_lost_is_a_difference():
    one = state(validations=[{"where": "after batch 4", "batches": [1], "loss": None}])
    (line,) = judge([one], [state(batches=one["batches"][2:])], {"trained": 2, "validated": 0})
    assert line.startswith("validations: after batch 4")


def test_the_last_bit_of_a_weight_is_a_difference():
    bit = torch.tensor([0.0, 1e-45])
    (line,) = judge([state()], [state(weights={"w": bit})], {"trained": 0, "validated": 0})
    assert line.startswith("weights: w differs by")


def test_the_table_counts_ends_and_names_the_seeds_that_failed():
    text = table([(3, Outcome("held")), (4, Outcome("differs: weights")), (9, Outcome("differs: weights"))])
    assert text.splitlines()[1].split() == ["held", "1"]
    assert text.splitlines()[2].split() == ["differs:", "weights", "2", "4", "9"]


def test_a_record_gives_the_cases_that_failed_back():
    case = draw_case(3, [NOISE])
    lines = [record(3, case, Outcome("error")), record(4, case, Outcome("held"))]
    assert failed("\n".join(lines)) == [(3, case)]


def test_the_command_ends_with_1_where_a_case_failed_and_prints_its_script(capsys):
    given = ["--cases", "1", "--technique", "fuzz_faults:Stumbles", "--alone", "--no-shrink"]
    assert main(given) == 1
    out = capsys.readouterr().out
    assert "seed 0" in out
    assert "KeyError" in out
    assert "techniques={" in out
