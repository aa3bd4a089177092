from functools import partial

import pytest
from eke import Technique
from eke.testing import Loader, check_pair
from faulty import Forgets, GradientNoise
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging


class Decay(GradientNoise):
    technique = Technique(
        name="decay",
        kind="callback",
        effects=("changes gradients",),
        exactness="model-changing",
    )

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for weight in pl_module.parameters():
            weight.grad.mul_(0.9)


class Rival(GradientNoise):
    technique = Technique(
        name="rival",
        kind="callback",
        conflicts={"gradient_noise": "two kinds of noise have no meaning together."},
        exactness="model-changing",
    )


class Double(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for weight in pl_module.parameters():
            weight.grad.mul_(2)


class AddOne(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for weight in pl_module.parameters():
            weight.grad.add_(1e-3)


class RefusesSecondPlace(Callback):
    def setup(self, trainer, pl_module, stage):
        if trainer.callbacks[0] is not self:
            raise ValueError("RefusesSecondPlace has to be the first callback of the list.")


def test_two_that_the_records_put_in_order_give_one_result_in_both_list_orders():
    assert check_pair(GradientNoise, Decay) is None


def test_two_that_exclude_each_other_are_refused_with_the_reason():
    assert "two kinds of noise have no meaning together" in check_pair(GradientNoise, Rival)


def test_two_whose_result_depends_on_the_list_order_are_found():
    with pytest.raises(
        AssertionError, match="(?s)the order first, second; then the order second, first.*gradient norm"
    ):
        check_pair(Double, AddOne, random=False, loader=Loader)


def test_a_refusal_in_one_order_only_is_found():
    with pytest.raises(AssertionError, match="refused in one order only"):
        check_pair(RefusesSecondPlace, Double)


def test_a_pair_that_resumes_elsewhere_is_found():
    with pytest.raises(AssertionError, match="unbroken run, then resumed one"):
        check_pair(Forgets, Decay)


def test_lightnings_two_averaging_callbacks_do_not_make_a_clean_pair():
    average = partial(StochasticWeightAveraging, 1e-2, 1)
    with pytest.raises(AssertionError, match=r"with callbacks in the order|the order first, second; then") as found:
        check_pair(average, EMAWeightAveraging, random=False, loader=Loader)
    assert "weights[" in str(found.value) or "loss" in str(found.value)
