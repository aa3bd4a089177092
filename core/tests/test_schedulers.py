"""Schedules: rates that techniques scale stay scaled, and schedules can be replaced, added or left out."""

import eke
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

SILENT = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
BUILD = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "warm-up from 0": lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1.0, step / 3)),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "in a row": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.8)], [3]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.8)]
    ),
}


class Net(LightningModule):
    def __init__(self, build, rate=0.1):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)
        self.build, self.rate, self.rates = build, rate, []

    def training_step(self, batch, batch_idx):
        self.rates.append([group["lr"] for group in self.trainer.optimizers[0].param_groups])
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        groups = [{"params": [self.layer.weight]}, {"params": [self.layer.bias], "lr": self.rate / 2}]
        optimizer = torch.optim.SGD(groups, lr=self.rate, momentum=0.5)
        if self.build is None:
            return optimizer
        scheduler = self.build(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def rates(build, *techniques, model=Net):
    model = model(build)
    trainer = Trainer(accelerator="cpu", max_steps=8, callbacks=list(techniques), **SILENT)
    trainer.fit(model, DataLoader(torch.randn(16, 4, generator=torch.Generator().manual_seed(1)), batch_size=2))
    return torch.tensor(model.rates), trainer


class Technique(eke.TechniqueCallback):
    technique = eke.Technique(name="one", kind="callback", effects=("changes learning rate", "changes optimizer"))


class Scales(Technique):
    def alter_optimizer(self, run, optimizer):
        run.scale_lr(optimizer, 10)
        return optimizer


class ScalesByHand(Technique):
    def alter_optimizer(self, run, optimizer):
        for group in optimizer.param_groups:
            group["lr"] *= 10
        return optimizer


class ScalesAndReplaces(Scales):
    def alter_optimizer(self, run, optimizer):
        twin = torch.optim.SGD([dict(group) for group in optimizer.param_groups], lr=0.1)
        return super().alter_optimizer(run, twin)


@pytest.mark.parametrize("kind", BUILD)
@pytest.mark.parametrize("how", [Scales, ScalesByHand, ScalesAndReplaces])
def test_a_scaled_rate_stays_scaled_under_every_schedule(kind, how):
    if how is ScalesByHand and kind == "warm-up from 0":
        pytest.skip("a rate of 0 does not show that it was scaled: run.scale_lr is for that")
    plain, _ = rates(BUILD[kind])
    scaled, trainer = rates(BUILD[kind], how())
    torch.testing.assert_close(scaled, 10 * plain)
    assert not any("eke_lr_factor" in group for group in trainer.optimizers[0].param_groups)


class OfItsOwn(Technique):
    """Another optimizer, with a rate of its own and one group for all, or three."""

    def __init__(self, groups):
        self.groups = groups

    def alter_optimizer(self, run, optimizer):
        weight, bias = run.module.layer.weight, run.module.layer.bias
        split = {1: [[weight, bias]], 2: [[weight], [bias]]}[self.groups]
        return torch.optim.SGD([{"params": params} for params in split], lr=0.4)


class OneGroup(Net):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.5)
        scheduler = self.build(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.parametrize("kind", ["lambda", "warm-up from 0", "cosine", "step", "in a row", "chained"])
@pytest.mark.parametrize("groups", [1, 2])
def test_an_optimizer_with_a_rate_of_its_own_is_scheduled_from_that(kind, groups):
    plain, _ = rates(BUILD[kind], model=OneGroup)
    own, _ = rates(BUILD[kind], OfItsOwn(groups), model=OneGroup)
    torch.testing.assert_close(own, 4 * plain.expand(8, groups))


def test_groups_with_rates_of_their_own_cannot_become_another_number():
    with pytest.raises(ValueError, match="LambdaLR was built for 2 parameter groups with rates of their own.* has 1"):
        rates(BUILD["lambda"], OfItsOwn(1))


def test_one_group_can_be_scaled():
    class One(Technique):
        def alter_optimizer(self, run, optimizer):
            run.scale_lr(optimizer, 10, group=1)
            return optimizer

    plain, _ = rates(BUILD["cosine"])
    scaled, _ = rates(BUILD["cosine"], One())
    torch.testing.assert_close(scaled, plain * torch.tensor([1.0, 10.0]))


@pytest.mark.parametrize("kind", [None, "cosine"])
def test_a_schedule_is_replaced_or_put_where_there_was_none(kind):
    class Replaces(Technique):
        def alter_schedulers(self, run, optimizers, schedulers):
            assert [type(one["scheduler"]).__name__ for one in schedulers] == (["CosineAnnealingLR"] if kind else [])
            return [{"scheduler": BUILD["lambda"](optimizers[0]), "interval": "step"}]

    wanted, _ = rates(BUILD["lambda"])
    got, _ = rates(BUILD[kind] if kind else None, Replaces())
    torch.testing.assert_close(got, wanted)


def test_a_schedule_is_left_out():
    class Drops(Technique):
        def alter_schedulers(self, run, optimizers, schedulers):
            return []

    got, trainer = rates(BUILD["step"], Drops())
    torch.testing.assert_close(got, torch.tensor([[0.1, 0.05]]).expand(8, 2))
    assert trainer.lr_scheduler_configs == []
