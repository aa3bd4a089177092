"""A step is called as Lightning calls it."""

import functools

import pytest
import torch
from eke.seams.step import step_arguments
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class OtherName(Net):
    def training_step(self, batch, i):
        return super().training_step(batch, i)


class Rest(Net):
    def training_step(self, *everything):
        return super().training_step(*everything)


class BatchAlone(Net):
    def training_step(self, batch):
        return super().training_step(batch, 0)


@pytest.mark.parametrize(("model", "given"), [(Net, 2), (OtherName, 2), (Rest, 2), (BatchAlone, 1)])
def test_a_step_gets_the_index_by_its_place_and_not_by_its_name(model, given):
    """What Lightning itself hands over is the judge."""
    assert step_arguments(model(), "batch", 7) == ("batch", 7)[:given]
    seen = []

    class Watch(model):
        def __init__(self):
            super().__init__()
            step = super().training_step
            self.training_step = functools.wraps(step)(lambda *given: seen.append(len(given)) or step(*given))

    options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    Trainer(accelerator="cpu", max_steps=1, **options).fit(Watch(), DataLoader(torch.randn(4, 4), batch_size=2))
    assert seen == [given]
