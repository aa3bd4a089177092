"""Draws and weights by enumeration, the gain by closed form, and the switch."""

import itertools

import eke
import pytest
import torch
from eke_importance_sampling import ImportanceSampling, draw, gain
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Classifier(LightningModule):
    def __init__(self, step=None):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 3)
        self.seen = []

    def training_step(self, batch, batch_idx):
        if self.layer.training and torch.is_grad_enabled():
            self.seen.append(len(batch[0]))
        return F.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(technique, model=None, **options):
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(48, 6, generator=generator), torch.randint(3, (48,), generator=generator))
    model = model or Classifier()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(max_epochs=1, callbacks=[technique], accelerator="cpu", **quiet, **options)
    trainer.fit(model, DataLoader(data, 12))
    return model


def test_the_weighted_gradient_is_the_full_gradient_by_enumeration():
    torch.manual_seed(0)
    layer, inputs, classes = nn.Linear(5, 3), torch.randn(4, 5), torch.tensor([0, 2, 1, 1])
    scores = torch.rand(4) + 0.1
    shares = scores / scores.sum()
    expected = torch.zeros(3, 5)
    for pair in itertools.product(range(4), repeat=2):  # every draw of two, with its probability
        chosen = torch.tensor(pair)
        weights = 1 / (4 * shares[chosen])
        loss = (weights * F.cross_entropy(layer(inputs[chosen]), classes[chosen], reduction="none")).mean()
        expected += shares[chosen].prod() * torch.autograd.grad(loss, layer.weight)[0]
    (full,) = torch.autograd.grad(F.cross_entropy(layer(inputs), classes), layer.weight)
    assert torch.allclose(expected, full, atol=1e-6)
    chosen, given = draw(scores, 1000, torch.Generator().manual_seed(0))
    assert torch.allclose(given, 1 / (4 * shares[chosen]))


def test_draws_come_in_proportion():
    chosen, _ = draw(torch.tensor([1.0, 0.0, 3.0]), 40_000, torch.Generator().manual_seed(0))
    shares = chosen.bincount(minlength=3) / 40_000
    assert shares[1] == 0
    assert abs(shares[2] - 0.75) < 0.01


def test_gain_of_equal_scores_is_one_and_of_a_single_one_the_root():
    assert gain(torch.full((16,), 0.3)) == pytest.approx(1)
    assert gain(torch.eye(16)[3]) == pytest.approx(4)
    assert gain(torch.zeros(16)) == pytest.approx(1)  # nothing to learn from any: all alike
    assert ImportanceSampling(1 / 3).threshold == pytest.approx(2)
    shares = torch.rand(9).double()
    shares /= shares.sum()
    by_paper = (1 - (shares - 1 / 9).square().sum() / shares.square().sum()) ** -0.5
    assert gain(shares) == pytest.approx(float(by_paper))


def test_drawing_by_gradient_has_less_variance_than_drawing_alike():
    torch.manual_seed(0)
    layer, inputs, classes = nn.Linear(8, 4), torch.randn(64, 8), torch.randint(4, (64,))
    inputs[:56] *= 0.05
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4, 8) * 6)
    classes[8:] = inputs[8:, :4].argmax(1)
    inputs[8:56] *= 60  # most are learned: their errors are small
    from eke.seams.losses import capture
    from eke.seams.scoring import error_norms

    with capture(64, lambda losses: None) as captured:
        F.cross_entropy(layer(inputs), classes)
    scores = error_norms(captured)
    gradients = torch.stack(
        [torch.autograd.grad(F.cross_entropy(layer(inputs[i : i + 1]), classes[i : i + 1]), layer.weight)[0].flatten()
         for i in range(64)]
    )  # fmt: skip
    shares = (scores / scores.sum()).unsqueeze(1)
    drawn = (gradients.square() / (64**2 * shares)).sum() - gradients.mean(0).square().sum()
    alike = gradients.square().sum() / 64 - gradients.mean(0).square().sum()
    assert drawn < alike
    assert gain(scores) > 1


@pytest.mark.parametrize("threshold", [0.0, 100.0])
def test_a_step_trains_on_the_kept_part(threshold):
    assert fit(ImportanceSampling(1 / 3, threshold=threshold)).seen == [4] * 4


def test_below_the_threshold_it_is_a_plain_run_on_the_first_part():
    class First(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step([part[:4] for part in batch], batch_idx)

    with_it, plain = fit(ImportanceSampling(1 / 3, threshold=100.0)), First()
    fit(ImportanceSampling(1.0), plain)
    assert torch.equal(with_it.layer.weight, plain.layer.weight)


def test_it_begins_to_look_once_the_gain_is_there():
    technique = ImportanceSampling(1 / 3, threshold=0.05, smoothing=0.9)
    fit(technique)
    assert technique.step_kind() == "scores"  # the mean starts from 0, and a gain is 1 or more


def test_sequences_of_unequal_length_keep_the_mean_over_tokens():
    """Every draw of one sample, with its probability, for a loss over tokens of which some are ignored."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    inputs, classes = torch.randn(3, 4, 5), torch.randint(3, (3, 4))
    classes[0, 1:], classes[1, 3:] = -100, -100

    class Sequences(LightningModule):
        def training_step(self, batch):
            return F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1])

    from unittest.mock import patch

    technique = ImportanceSampling(1 / 3, threshold=0.0, smoothing=0.0)
    module = Sequences()
    run = eke.Run(technique, Trainer(logger=False, accelerator="cpu"), module)
    expected, shares = torch.zeros(3, 5), []
    for sample in range(3):

        def only(scores, count, generator=None, sample=sample):
            share = (scores / scores.sum())[sample]
            shares.append(share)
            return torch.tensor([sample]), (1 / (3 * share)).reshape(1)

        with patch("eke_importance_sampling.callback.draw", only):
            loss = technique.around_step(run, module.training_step, [inputs, classes])
        expected += shares[-1] * torch.autograd.grad(loss, model.weight)[0]
    loss = F.cross_entropy(model(inputs).transpose(1, 2), classes)
    assert torch.allclose(expected, torch.autograd.grad(loss, model.weight)[0], atol=1e-6)


@pytest.mark.parametrize("threshold", [0.0, 100.0])
def test_the_logged_loss_is_the_mean_of_the_batch_and_the_weighted_one_has_a_name_of_its_own(threshold):
    """At rate 0, so that the losses stay: with a draw that of the whole batch, without one that of its first part."""
    read = []

    class Reads(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train_loss", loss)
            return loss

        def on_train_batch_end(self, outputs, batch, batch_idx):
            losses = F.cross_entropy(self.layer(batch[0]), batch[1], reduction="none")
            read.append((losses.detach(), {name: float(one) for name, one in self.trainer.logged_metrics.items()}))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    fit(ImportanceSampling(1 / 3, threshold=threshold), Reads(), log_every_n_steps=1)
    assert len(read) == 4
    for losses, logged in read:
        mean = losses.mean() if threshold == 0 else losses[:4].mean()
        assert logged["train_loss"] == pytest.approx(float(mean), rel=1e-5)
        assert ("eke/importance_sampling/weighted_loss" in logged) == (threshold == 0)
        if threshold == 0:
            assert logged["eke/importance_sampling/weighted_loss"] != pytest.approx(float(mean), rel=1e-4)


@pytest.mark.parametrize("wrong", [{"keep": 0}, {"keep": 1.5}, {"smoothing": 1}, {"threshold": -1}, {"by": "guess"}])
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ImportanceSampling(**wrong)


def test_infinite_losses_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        draw(torch.tensor([1.0, torch.inf]), 1)


def test_a_loss_without_logits_asks_for_the_other_way():
    import eke

    class Regression(Classifier):
        def training_step(self, batch, batch_idx):
            return eke.reduce_loss((self.layer(batch[0]).mean(1) - batch[1]).square())

    with pytest.raises(ValueError, match="plain cross_entropy"):
        fit(ImportanceSampling(), Regression())
    fit(ImportanceSampling(by="loss", threshold=0.0), Regression())
