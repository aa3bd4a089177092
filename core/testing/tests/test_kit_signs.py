"""The kit judges a method that goes by the sign of the gradient, which is rounding alone in the bias of a key."""

import eke.testing.checks.common as common
import pytest
import torch
from eke.testing import SHAPES, TechniqueContract, TinyBlocks, TinyGPT2, checks
from eke.testing.models import WIDTH
from lion import Lion


@pytest.mark.parametrize("model", SHAPES)
def test_what_is_made_of_rounding_is_the_bias_of_the_keys(model):
    if model is TinyGPT2:
        pytest.importorskip("transformers")
    found = {name: mask for name, mask in common.made_of_rounding(model).items() if mask.any()}
    assert len(found) == 4
    for name, mask in found.items():
        assert name.endswith("bias")
        assert mask.tolist() == [False] * WIDTH + [True] * WIDTH + [False] * WIDTH


def test_weights_that_differ_elsewhere_are_found_and_in_the_bias_of_the_keys_are_not():
    first = dict(TinyBlocks().state_dict())
    for name, place, found in (("blocks.1.attn.qkv.bias", WIDTH, False), ("blocks.1.attn.qkv.bias", 0, True),
                               ("embed.weight", 0, True)):  # fmt: skip
        second = {key: value.clone() for key, value in first.items()}
        second[name].view(-1)[place] += 0.1
        if found:
            with pytest.raises(AssertionError, match=f"{name} differs by 0.1"):
                common.assert_same_weights(TinyBlocks, first, second, "two runs", 1e-5)
        else:
            common.assert_same_weights(TinyBlocks, first, second, "two runs", 1e-5)


class OfTwo(Lion):
    """Lion that moves one weight by a thousandth more where there are two processes."""

    def after_optimizer_step(self, run, optimizer):
        if run.world_size > 1:
            with torch.no_grad():
                run.module.embed.weight[0, 0] += 1e-3


def test_a_sign_method_that_really_differs_on_two_processes_is_found():
    with pytest.raises(AssertionError, match=r"(?s)weights of one process, then of two.*embed.weight differs"):
        checks.ranks_equal_one_process(checks.Subject(OfTwo))


class TestLion(TechniqueContract):
    exceptions = {"test_it_has_a_record": "It belongs to the kit's tests and is not installed as a technique."}

    def build(self):
        return Lion()
