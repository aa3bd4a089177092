"""What has no gradient is said: once, by name, and with what to do."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
from eke import NoEffectWarning, Technique, TechniqueCallback
from eke.seams import interceptor
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader


class Nothing(TechniqueCallback):
    technique = Technique(name="nothing", kind="callback")


class SkipsOne(TechniqueCallback):
    technique = Technique(name="skips_one", kind="callback", effects=("changes hidden states",))

    def alter_model(self, run):
        self.blocks = run.blocks()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.blocks.put(self.blocks.now()[1], interceptor.Skip())


class OwnLoss(TechniqueCallback):
    technique = Technique(name="own_loss", kind="callback", effects=("replaces loss",))


class Model(pl.LightningModule):
    """Three blocks and a head; ``reentrant`` recomputes the blocks, ``late`` is used from the third batch on."""

    def __init__(self, reentrant=False, unused=0, late=False):
        super().__init__()
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True) for _ in range(3))
        self.head = nn.Linear(8, 1)
        self.unused = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(unused))
        self.late = nn.Linear(8, 8) if late else None
        self.reentrant, self.automatic_optimization = reentrant, True

    def training_step(self, batch, batch_idx):
        for block in self.blocks:
            batch = checkpoint(block, batch, use_reentrant=True) if self.reentrant else block(batch)
        if self.late is not None and batch_idx >= 2:
            batch = self.late(batch)
        return self.head(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def said(model, *techniques, steps=7, **options):
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, **options}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = pl.Trainer(max_steps=steps, accelerator="cpu", callbacks=list(techniques), **options)
        trainer.fit(model, DataLoader([torch.randn(2, 3, 8) for _ in range(20)], batch_size=None))
    return [str(one.message) for one in caught if issubclass(one.category, NoEffectWarning)]


@pytest.mark.parametrize("steps", [2, 7])
def test_parameters_that_the_loss_does_not_depend_on_are_named_once(steps):
    (message,) = said(Model(unused=5), Nothing(), steps=steps, accumulate_grad_batches=2)
    assert "has had no gradient, and does not train: unused.0.weight, unused.1.weight, unused.2.weight" in message
    assert "and 2 more" in message
    assert "freeze them" in message


def test_where_all_trains_or_is_frozen_nothing_is_said_nor_of_what_trains_later():
    assert said(Model(), Nothing()) == []
    assert said(Model(late=True), Nothing()) == []
    frozen = Model(unused=2)
    frozen.unused.requires_grad_(False)
    assert said(frozen, Nothing()) == []


def test_a_block_that_a_technique_skips_is_not_meant():
    assert said(Model(), SkipsOne()) == []
    (message,) = said(Model(unused=1), SkipsOne())
    assert "does not train: unused.0.weight. The loss" in message


def test_reentrant_recomputing_that_leaves_the_blocks_without_is_said_after_the_first_step():
    (message,) = said(Model(reentrant=True), Nothing(), steps=1)
    assert "No block has any" in message
    assert "use_reentrant=False" in message
    (message,) = said(Model(reentrant=True), OwnLoss(), steps=1)
    assert "blocks.0.self_attn.in_proj_weight" in message


def test_a_loss_of_a_technique_s_own_may_leave_out_the_user_s_head():
    assert said(Model(unused=1), OwnLoss()) == []
