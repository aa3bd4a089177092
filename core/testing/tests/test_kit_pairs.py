from functools import partial
from itertools import combinations

import pytest
from eke import Technique
from eke.testing import Loader, check_pair, check_together
from eke.testing.covering import groups, share
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
    with pytest.raises(AssertionError, match="(?s)the callbacks in one order, then in the other.*gradient norm"):
        check_pair(Double, AddOne, random=False, loader=Loader)


def test_a_refusal_in_one_order_only_is_found():
    with pytest.raises(AssertionError, match="refused in one order only"):
        check_pair(RefusesSecondPlace, Double)


def test_a_pair_that_resumes_elsewhere_is_found():
    with pytest.raises(AssertionError, match="an unbroken run, then one that went on"):
        check_pair(Forgets, Decay)


def test_lightnings_two_averaging_callbacks_do_not_make_a_clean_pair():
    average = partial(StochasticWeightAveraging, 1e-2, 1)
    with pytest.raises(AssertionError, match=r"callbacks in the other order|in one order, then") as found:
        check_pair(average, EMAWeightAveraging, random=False, loader=Loader)
    assert "weights[" in str(found.value) or "loss" in str(found.value)


# Several at once


def test_a_run_of_several_that_fails_is_narrowed_to_the_two_that_do():
    builds = {"double": Double, "nothing": Callback, "add_one": AddOne}
    with pytest.raises(AssertionError, match=r"^double \+ add_one fail together \(found in a run of double, nothing,"):
        check_together(builds, random=False, loader=Loader)


def test_one_that_fails_by_itself_is_named_alone():
    with pytest.raises(AssertionError, match=r"^forgets fail together \(found in a run of decay, forgets\)"):
        check_together({"decay": Decay, "forgets": Forgets})


def test_of_several_those_that_refuse_each_other_are_named_and_the_others_checked_without_the_one_and_the_other():
    builds = {"noise": GradientNoise, "decay": Decay, "rival": Rival}
    ((pair, words),) = check_together(builds).items()
    assert pair == ("noise", "rival")
    assert "two kinds of noise have no meaning together" in words
    with pytest.raises(AssertionError, match="^forgets fail"):
        check_together({"rival": Rival, "forgets": Forgets, "decay": Decay})


def test_groups_hold_every_pair_and_none_that_does_not_fit():
    names = [f"t{number:02}" for number in range(20)]
    apart = {"t00", "t01"}
    pairs = [pair for pair in combinations(names, 2) if set(pair) != apart]
    found = groups(pairs, lambda group: not apart <= set(group), seed=1)
    covered = {frozenset(pair) for group in found for pair in combinations(group, 2)}
    assert covered == {frozenset(pair) for pair in pairs}
    assert max(map(len, found)) == 6
    assert len(found) < len(pairs) / 6
    assert found == groups(pairs, lambda group: not apart <= set(group), seed=1)
    assert found != groups(pairs, lambda group: not apart <= set(group), seed=2)


def test_two_share_what_one_of_them_writes():
    reads, too, writes, other = (
        Technique(name=name, kind="callback", effects=(effect,))
        for name, effect in (
            ("a", "reads loss"),
            ("e", "reads loss"),
            ("b", "changes loss"),
            ("c", "changes batch content"),
        )
    )
    assert share(reads, writes)
    assert share(writes, reads)
    assert not share(reads, too)
    assert not share(writes, other)
    assert share(other, Technique(name="d", kind="callback", conflicts={"c": "they have no meaning together."}))
