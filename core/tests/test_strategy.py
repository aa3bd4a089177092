"""A strategy of Eke resumes as exactly as a callback does."""

import eke
import pytest
from eke.testing import Cut, checks
from eke.testing.data import shuffled
from eke.testing.models import STEPS
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

STEPWISE = {"loader": shuffled, "random": True, "dropout": 0.1}


class Plain(SingleDeviceStrategy):
    technique = eke.Technique(name="plain", kind="strategy")

    def __init__(self):
        super().__init__("cpu")


class Kept(eke.TechniqueStrategy, Plain):
    pass


@pytest.mark.parametrize("cut", [Cut(epochs=1), Cut(steps=2)], ids=["epoch end", "mid-epoch"])
def test_a_run_with_only_a_strategy_of_eke_resumes_to_the_same_bits(cut):
    checks.resumes(checks.Subject(build=Kept), cut, **STEPWISE)


def test_it_resumes_within_an_accumulation_window():
    subject = checks.Subject(build=Kept, steps=2 * STEPS)
    checks.resumes(subject, Cut(batches=5), accumulate_grad_batches=2, **STEPWISE)


def test_lightnings_own_strategy_does_not():
    with pytest.raises(AssertionError, match="random state"):
        checks.resumes(checks.Subject(build=Plain), Cut(steps=2), **STEPWISE)


class KeptOnTwo(eke.TechniqueStrategy, DDPStrategy):
    technique = eke.Technique(name="kept_on_two", kind="strategy")


def test_with_ddp_two_processes_equal_one():
    checks.ranks_equal_one_process(checks.Subject(build=KeptOnTwo))
