"""The fit, the shares, and that the weighted mean over draws is the mean over all."""

import pytest
import torch
from eke_importance_sampling import RAIS, fit_squares, mixed
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 3)
        self.seen, self.sums, self.read = [], [], []

    def training_step(self, batch, batch_idx):
        self.seen[-1] += batch[2].tolist()
        loss = F.cross_entropy(self.layer(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        read = self.trainer.logged_metrics
        self.sums[-1] += float(read["eke/rais/weighted_loss"]) * len(batch[0])
        self.read.append((batch[2], float(read["train_loss"])))

    def on_train_epoch_start(self):
        self.seen.append([])
        self.sums.append(0.0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def fit(technique, epochs, count=60):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 6, generator=generator)
    inputs[::5] *= 6
    data = TensorDataset(inputs, torch.randint(3, (count,), generator=generator), torch.arange(count))
    model = Classifier()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    Trainer(max_epochs=epochs, callbacks=[technique], accelerator="cpu", **quiet).fit(model, DataLoader(data, 12))
    return model, data


def test_the_fit_finds_what_made_the_norms():
    generator = torch.Generator().manual_seed(0)
    before, age = torch.rand(500, generator=generator), torch.randint(1, 9, (500,), generator=generator)
    now = (0.1 + 0.5 * before.double().square() + 0.02 * age).sqrt()
    assert torch.allclose(fit_squares(before, age, now), torch.tensor([0.1, 0.5, 0.02]).double(), atol=1e-6)
    falling = fit_squares(before, age, (1 - 0.5 * before.double().square()).sqrt())
    assert (falling >= 0).all()
    assert falling[1] == 0
    assert fit_squares(torch.zeros(4), torch.ones(4), torch.zeros(4)).isfinite().all()


def test_shares_are_mixed_with_equal_ones():
    assert torch.allclose(mixed(torch.tensor([1.0, 3.0]), 0.2), torch.tensor([0.3, 0.7]).double())
    assert torch.allclose(mixed(torch.zeros(4), 0.2), torch.full((4,), 0.25).double())


def test_the_weighted_mean_over_many_epochs_is_the_mean_over_all():
    technique = RAIS(0.3)
    model, data = fit(technique, 300)  # learning rate 0: the losses stay
    losses = F.cross_entropy(model.layer(data.tensors[0]), data.tensors[1], reduction="none")
    assert sorted(model.seen[0]) == list(range(60))
    assert all(len(epoch) == 60 for epoch in model.seen)
    sums = torch.tensor(model.sums[1:]) / 60
    assert abs(sums.mean() - losses.mean()) < 4 * sums.std() / len(sums) ** 0.5
    unweighted = losses[torch.tensor(model.seen[1:]).flatten()].mean()
    assert unweighted > 1.2 * losses.mean()
    assert technique.gain > 1.03
    for numbers, read in model.read:  # what the step logged is the plain mean of what it saw
        assert read == pytest.approx(float(losses[numbers].mean()), rel=1e-5)


def test_epochs_before_the_start_see_every_sample_once():
    model, _ = fit(RAIS(start=3), 4)
    assert [len(set(epoch)) for epoch in model.seen[:3]] == [60, 60, 60]
    assert len(set(model.seen[3])) < 60


@pytest.mark.parametrize("wrong", [{"floor": 0}, {"floor": 1.1}, {"start": 0}, {"start": 1.5}])
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RAIS(**wrong)


@pytest.mark.parametrize("broken", [slice(0, 3), slice(None)], ids=["some", "all"])
def test_losses_that_are_nan_are_said_and_the_samples_keep_what_was_known(broken):
    class Breaks(Classifier):
        def training_step(self, batch, batch_idx):
            logits = self.layer(batch[0])
            if self.current_epoch == 1 and batch_idx + 1 == self.trainer.num_training_batches:
                logits = logits.clone()
                logits[broken] = torch.nan
            self.seen[-1] += batch[2].tolist()
            return F.cross_entropy(logits, batch[1])

        def on_after_backward(self):
            for weight in self.parameters():
                weight.grad.nan_to_num_(0.0)  # as a scaler of gradients leaves such a step out

        def on_train_batch_end(self, *_):
            pass  # nothing is read of what was logged

    technique, model = RAIS(), Breaks()
    data = TensorDataset(torch.randn(24, 6), torch.randint(3, (24,)), torch.arange(24))
    options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    run = Trainer(max_epochs=3, callbacks=[technique], accelerator="cpu", **options)
    with pytest.warns(UserWarning, match="RAIS: .* losses of this epoch were NaN or infinite"):
        run.fit(model, DataLoader(data, 24 if broken == slice(None) else 12))
    assert len(model.seen) == 3
