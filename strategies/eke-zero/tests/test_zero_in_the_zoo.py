"""On every model of the zoo, on one process: what is divided among several is the same run."""

import pytest
import torch
from eke.testing import TinyBlocks, ZooContract
from eke.testing.models import STEPS
from eke.testing.run import make_trainer
from eke_zero import ZeRO, ZeROError


class TestStageOneInTheZoo(ZooContract):
    def build_in_zoo(self, animal):
        return ZeRO(stage=1)

    def shows(self, plain, seen):
        assert seen.losses == plain.losses
        return ""


class TestStageThreeInTheZoo(TestStageOneInTheZoo):
    zoo = ("gpt2", "t5", "vit")

    def build_in_zoo(self, animal):
        return ZeRO(stage=3)


class Spare(TinyBlocks):
    """Holds a parameter that the loss does not reach, as DINOv2 its mask token."""

    def make(self, dropout, layers):
        super().make(dropout, layers)
        self.spare = torch.nn.Parameter(torch.zeros(3))


def test_a_parameter_that_the_loss_does_not_reach_is_named_before_the_first_step():
    model, trainer = Spare(), make_trainer(ZeRO(stage=1), epochs=1)
    with pytest.raises(ZeROError, match=r"does not reach spare, .*requires_grad_\(False\)"):
        trainer.fit(model)
    assert trainer.global_step == 0
    model.spare.requires_grad_(False)
    trainer = make_trainer(ZeRO(stage=1), epochs=1)
    trainer.fit(model)
    assert trainer.global_step == STEPS
