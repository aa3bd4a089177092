import eke
import pytest
import torch
from eke.testing import TechniqueContract, TinyBlocks, fit
from {{ cookiecutter.__module }} import {{ cookiecutter.class_name }}, scale_gradients, share
from torch import nn


class TestContract(TechniqueContract):
    def build(self):
        return {{ cookiecutter.class_name }}(warmup_steps=6)

    def idle(self):
        return {{ cookiecutter.class_name }}(warmup_steps=1)


def test_the_share_grows_by_equal_steps_to_one_and_stays():
    assert [share(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_gradients_are_multiplied_and_weights_without_one_left_alone():
    with_one, without = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with_one.grad = torch.tensor([2.0, -4.0])
    scale_gradients([with_one, without], 0.25)
    assert with_one.grad.tolist() == [0.5, -1.0]
    assert without.grad is None


def test_the_gradients_of_a_run_follow_the_share():
    # One step, so that both runs still have the same weights when the gradient is taken.
    plain, scaled = (fit(TinyBlocks(), *given, epochs=1, steps=1).state for given in ([], [{{ cookiecutter.class_name }}(4)]))
    norms = [state["steps"]["epoch 0 batch 0"]["gradient norm"] for state in (plain, scaled)]
    assert norms[1] == pytest.approx(norms[0] / 4, rel=1e-5)


def test_warmup_steps_below_one_are_refused_at_once():
    with pytest.raises(ValueError, match="warmup_steps=0 .* Give 1 or more"):
        {{ cookiecutter.class_name }}(warmup_steps=0)


def test_the_registry_builds_it():
    assert isinstance(eke.create("{{ cookiecutter.__entry }}", warmup_steps=3), {{ cookiecutter.class_name }})
