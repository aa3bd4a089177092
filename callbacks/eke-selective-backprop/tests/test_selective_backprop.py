"""Which samples are drawn, when, and on what a step trains."""

import pytest
import torch
from eke_selective_backprop import SelectiveBackprop, select
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 3)
        self.seen = []

    def training_step(self, batch, batch_idx):
        if torch.is_grad_enabled():
            self.seen.append(batch[2].tolist())
        return F.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def fit(technique, model=None, **options):
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(
        torch.randn(40, 6, generator=generator), torch.randint(3, (40,), generator=generator), torch.arange(40)
    )
    model = model or Classifier()
    options = {"max_epochs": 1, **options}
    Trainer(callbacks=[technique], accelerator="cpu", **QUIET, **options).fit(model, DataLoader(data, 4))
    return model, data


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.8])
def test_the_number_of_samples_is_exact_and_high_losses_come_more_often(keep):
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(20)
    losses = torch.randperm(20, generator=generator).float()
    for _ in range(3000):
        chosen = select(losses, keep, generator)
        assert len(chosen.unique()) == round(keep * 20)
        counts[chosen] += 1
    by_rank = counts[losses.argsort()]
    assert by_rank[-5:].min() > by_rank[:5].max()


def test_a_single_sample_is_drawn_by_the_power_of_its_rank():
    generator = torch.Generator().manual_seed(0)
    losses, keep = torch.tensor([0.3, 0.1, 0.4, 0.2]), 0.25
    counts = torch.zeros(4)
    for _ in range(20_000):
        counts[select(losses, keep, generator)] += 1
    wanted = torch.tensor([2.5, 0.5, 3.5, 1.5]) ** 3
    assert torch.allclose(counts / 20_000, wanted / wanted.sum(), atol=0.015)


def test_the_window_and_the_steps_between():
    seen, _ = fit(SelectiveBackprop(0.5, start=0.3, end=0.8, interrupt=2))
    assert [len(one) for one in seen.seen] == [4, 4, 4, 2, 4, 2, 4, 2, 4, 4]


def test_a_step_trains_on_samples_of_its_batch_and_on_the_hard_ones():
    model, data = fit(SelectiveBackprop(0.5, start=0, end=1, interrupt=0), max_epochs=60)
    losses = F.cross_entropy(model.layer(data.tensors[0]), data.tensors[1], reduction="none").detach()  # rate 0
    counts = torch.zeros(40)
    for i, numbers in enumerate(model.seen):
        assert all(number // 4 == i % 10 for number in numbers)
        counts[numbers] += 1
    ranks = losses.reshape(10, 4).argsort(1).argsort(1).flatten()
    by_rank = [float(counts[ranks == rank].mean()) for rank in range(4)]
    assert by_rank == sorted(by_rank)
    assert by_rank[3] > 2 * by_rank[0]


@pytest.mark.parametrize(
    "wrong", [{"keep": 0}, {"start": 0.6, "end": 0.5}, {"end": 1.2}, {"interrupt": 1}, {"interrupt": -2}]
)
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SelectiveBackprop(**wrong)


def test_a_run_without_an_end_is_refused():
    with pytest.raises(
        MisconfigurationException,
        match=r"SelectiveBackprop\(start=0.5\) goes by the length of the run, which is not known",
    ):
        fit(SelectiveBackprop(), max_epochs=-1)


def test_the_logged_loss_is_the_mean_of_the_whole_batch_and_that_of_the_chosen_has_a_name_of_its_own():
    """At rate 0, so that the losses stay."""
    read = []

    class Reads(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train_loss", loss)
            self.trained_on = batch
            return loss

        def on_train_batch_end(self, outputs, batch, batch_idx):
            whole, chosen = (float(F.cross_entropy(self.layer(x), y)) for x, y, _ in (batch, self.trained_on))
            read.append((whole, chosen, {name: float(one) for name, one in self.trainer.logged_metrics.items()}))

    fit(SelectiveBackprop(0.5, start=0, end=1, interrupt=0), Reads(), log_every_n_steps=1)
    assert len(read) == 10
    for whole, chosen, logged in read:
        assert logged["train_loss"] == pytest.approx(whole, rel=1e-5)
        assert logged["eke/selective_backprop/chosen_loss"] == pytest.approx(chosen, rel=1e-5)
        assert chosen != pytest.approx(whole, rel=1e-3)
