"""Two callbacks of Lightning that are known not to resume: the kit has to say so, and to say what differs."""

import pytest
import torch
from eke.testing import Cut, TinyBlocks, checks
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning, ModelPruning


class Backbone(TinyBlocks):
    """BackboneFinetuning asks for an attribute of this name, and for an optimizer without it."""

    def make(self, dropout, layers):
        super().make(dropout, layers)
        self.backbone = self.blocks  # one module under two names, as with pretrained parts

    def configure_optimizers(self):
        tail = [weight for name, weight in self.named_parameters() if not name.startswith("blocks")]
        return torch.optim.AdamW(tail, lr=1e-2)


def pruning():
    return checks.Subject(lambda: ModelPruning("l1_unstructured", amount=0.3, use_lottery_ticket_hypothesis=True))


def finetuning():
    return checks.Subject(lambda: BackboneFinetuning(unfreeze_backbone_at_epoch=1), model=Backbone)


def test_model_pruning_does_not_resume_at_an_epoch_end():
    with pytest.raises(AssertionError, match=r"(?s)then of the one resumed.*loss"):
        checks.resumes(pruning(), Cut(epochs=1))


def test_model_pruning_does_not_resume_in_mid_epoch():
    with pytest.raises(AssertionError, match=r"(?s)then of the one resumed.*loss"):
        checks.resumes(pruning(), Cut(steps=6))


def test_model_pruning_leaves_the_model_pruned_after_an_exception():
    with pytest.raises(AssertionError, match=r"(?s)after an exception in training_step.*\n.*_forward_pre_hooks"):
        checks.fails_cleanly(pruning(), "training_step")


@pytest.mark.parametrize("cut", [Cut(epochs=2), Cut(steps=9)], ids=["epoch end", "mid-epoch"])
def test_backbone_finetuning_freezes_again_on_resume(cut):
    with pytest.raises(AssertionError, match=r"\['frozen'\] has 0 entries, then \d+"):
        checks.resumes(finetuning(), cut)


@pytest.mark.parametrize("model", [TinyBlocks, Backbone])
@pytest.mark.parametrize("cut", [Cut(epochs=2), Cut(steps=9)], ids=["epoch end", "mid-epoch"])
def test_without_them_the_same_runs_resume(model, cut):
    checks.resumes(checks.Subject(Callback, model=model), cut)
