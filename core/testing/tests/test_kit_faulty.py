from functools import partial

import faulty
import pytest
from eke.testing import Cut, RankError, checks, run_alone, shuffled
from eke.testing.checks import Subject

# The tests of the contract, each as the call that it makes.
STOCK = {"loader": shuffled, "random": True}
CHECKS = {
    "trains": checks.trains,
    "loss": checks.loss_falls,
    "epoch end": lambda subject: checks.resumes(subject, Cut(epochs=2), **STOCK),
    "mid-epoch": lambda subject: checks.resumes(subject, Cut(steps=9), **STOCK),
    "random state": checks.leaves_the_random_state_alone,
    "off": checks.changes_nothing_when_off,
    "model as before": checks.leaves_the_model_as_it_was,
    "record": checks.does_what_its_record_says,
    "big batch": checks.accumulation_equals_the_big_batch,
    "bf16": checks.trains_in_bf16,
    "clipping": checks.clips_gradients,
    "compile": checks.compiles,
    "two processes": checks.ranks_equal_one_process,
    "two processes resume": lambda subject: checks.ranks_resume(subject, after_batches=5, accumulate_grad_batches=2),
    "second pass": checks.sees_one_step_beside_a_second_pass,
    "fails in training": lambda subject: checks.fails_cleanly(subject, "training_step"),
    "fails in validation": lambda subject: checks.fails_cleanly(subject, "validation_step"),
    "copies": checks.pickles_and_copies,
    "command line": checks.a_command_line_builds_it,
    "fits twice": checks.fits_twice_validates_and_tests,
    "without it": checks.loads_without_it,
    "weights only": checks.weights_only_checkpoint_loads,
    "cost": checks.costs_nothing_when_idle,
    "changes": checks.says_what_changed,
    "may change": checks.steps_do_not_depend_on_what_may_change,
}

# Fault: the check that has to find it, what that says, and the other checks that the fault breaks as well.
FAULTS = [
    (faulty.Forgets, "epoch end", "loss.*is .*, then", {"mid-epoch"}),
    (faulty.FreezesAgain, "epoch end", r"frozen.*has 0 entries, then 1", {"mid-epoch", "two processes"}),
    (faulty.HalvesTheRate, "epoch end", "learning rate", {"mid-epoch"}),
    (faulty.NeedsItself, "without it", "fails to load without it: RuntimeError", {"weights only"}),
    (faulty.DrawsGlobally, "random state", r"\['torch'\]", set()),
    (faulty.ActsWhenOff, "off", "with it switched off:", {"cost"}),
    (faulty.PatchesAClass, "model as before", "GELU.*forward", {"fails in training", "fails in validation"}),
    (faulty.LeaksAWrapper, "fails in training", r"blocks\.0.*forward", {"fails in validation"}),
    (
        faulty.LeavesAHook,
        "model as before",
        "_forward_hooks.*is 0, then 1",
        {"fails in training", "fails in validation"},
    ),
    (faulty.KeepsOtherWeights, "fails in validation", "weights when the last batch began or ended", set()),
    (faulty.LeavesHalfAFile, "fails in training", r"files left after.*noise-0\.part", {"fails in validation"}),
    (faulty.LeavesAPerturbation, "fails in training", "weights when the last batch began", {"off", "cost"}),
    (faulty.GoesUphill, "loss", r"mean loss went from \d", set()),
    (faulty.ClaimsToBeExact, "record", "its record says 'exact'", set()),
    (faulty.WorksOnce, "fits twice", "already used", set()),
    (faulty.HoldsALambda, "copies", "a new technique cannot be pickled", set()),
    (faulty.CopiesComputeWithTheOriginal, "copies", "computes with weights that are not its own", set()),
    (faulty.StopsTheVectors, "trains", r"did not move .*norm1\.bias", {"bf16"}),
    (faulty.ScalesEachBatch, "big batch", "weights under accumulation", set()),
    (faulty.UndoesClipping, "clipping", "longer than gradient_clip_val=0.01", set()),
    (faulty.DividesByZeroInBf16, "bf16", "not finite after training", set()),
    (faulty.DiffersBetweenRanks, "two processes", "of rank 0, then of rank 1", set()),
    (faulty.HooksInMidRun, "compile", "without torch.compile, then with it", set()),
    (faulty.SetsTheRateSecretly, "record", "the learning rate changed", set()),
    (faulty.TakesItsTime, "cost", r"\d+ Python calls a step more", set()),
    (
        faulty.KeepsTheStateOfOneProcess,
        "two processes resume",
        "state of rank [01] in an unbroken run",
        {"two processes", "big batch"},
    ),
    (faulty.CountsPasses, "second pass", "each step has a second pass", {"big batch"}),
    (faulty.SpeaksPython, "changes", "on_changed_arguments='warn', it ends in KeyError", set()),
    (faulty.CallsItsScaleHarmless, "may change", "may_change names 'scale', and with", set()),
    (faulty.TakesAnything, "command line", "does not build it", set()),
]


def subject(fault):
    if fault is faulty.TakesAnything:
        return Subject(lambda: fault(1e-3), idle=lambda: fault(0.0), arguments={"scale": 1e-3})
    return Subject(fault, idle=lambda: fault(scale=0))


@pytest.mark.parametrize("check", CHECKS)
def test_a_sound_technique_passes(check):
    CHECKS[check](subject(faulty.GradientNoise))


@pytest.mark.parametrize(("fault", "check", "message", "also"), FAULTS, ids=[fault.__name__ for fault, *_ in FAULTS])
def test_a_fault_is_found_by_the_right_check(fault, check, message, also):
    with pytest.raises(Exception, match=f"(?s){message}") as found:
        CHECKS[check](subject(fault))
    assert fault is faulty.WorksOnce or "AssertionError" in found.exconly()


def passes(name, fault):
    CHECKS[name](subject(fault))


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "check", "message", "also"), FAULTS, ids=[fault.__name__ for fault, *_ in FAULTS])
def test_a_fault_fails_no_check_that_it_does_not_break(fault, check, message, also):
    failed = set()
    for name in CHECKS:
        try:
            run_alone(partial(passes, name, fault))
        except RankError:
            failed.add(name)
    assert failed == {check} | also
