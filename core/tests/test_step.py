"""A step is called as Lightning calls it."""

import functools

import eke
import pytest
import torch
from eke.seams import interceptor
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


class Chain(LightningModule):
    """Two blocks that train, and nothing else that does."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def training_step(self, batch, batch_idx):
        for block in self.blocks:
            batch = block(batch)
        return batch.square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SkipsAll(eke.TechniqueCallback):
    technique = eke.Technique(name="skips", kind="callback", effects=("changes hidden states",))

    def alter_model(self, run):
        self.blocks = run.blocks()

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        for block in self.blocks.now():
            self.blocks.put(block, *([interceptor.Skip()] if batch_idx == 1 else []))


def test_a_step_in_which_nothing_that_trains_runs_moves_nothing_and_a_loss_without_graph_stays_the_users_affair():
    options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    data, weights = DataLoader(torch.randn(6, 4), batch_size=2), []

    class Watch(Chain):
        def on_train_batch_end(self, *_):
            weights.append(torch.cat([weight.detach().flatten() for weight in self.parameters()]))

    Trainer(accelerator="cpu", max_epochs=1, callbacks=[SkipsAll()], **options).fit(Watch(), data)
    first, second, third = weights
    assert torch.equal(first, second)
    assert not torch.equal(second, third)

    class Detached(Chain):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx).detach()

    with pytest.raises(RuntimeError, match="does not require grad"):
        Trainer(accelerator="cpu", max_epochs=1, callbacks=[SkipsAll()], **options).fit(Detached(), data)
