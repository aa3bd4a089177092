"""What InfoBatch promises: the paper's plan, weights that add up, a gradient without bias, learning rates that end."""

from itertools import combinations

import eke
import pytest
import torch
from eke.testing import TinyBlocks, TinyViT, fit
from eke.testing.data import BATCH
from eke.testing.models import STEPS
from eke_infobatch import InfoBatch, by_step, plan_epoch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset


def everything(*scores):
    return torch.tensor(scores, dtype=torch.float64), torch.ones(len(scores), dtype=torch.bool)


def test_the_plan_is_the_papers_example():
    """Mean 1.12: three samples are below, a third of them is left out, the other two weigh three halves."""
    kept, weights = plan_epoch(*everything(0.1, 0.2, 0.3, 2, 3), 1 / 3, torch.Generator().manual_seed(0))
    assert len(kept) == 4
    assert {3, 4} < set(kept.tolist())
    assert sorted(weights.tolist()) == [0, 1, 1, 1.5, 1.5]
    assert weights.sum() == 5


@pytest.mark.parametrize("count", [7, 10, 33])
def test_weights_add_up_to_the_number_of_samples_whatever_rounding_leaves(count):
    scores = torch.rand(count, dtype=torch.float64)
    for ratio in (0.1, 0.5, 0.9):
        _, weights = plan_epoch(scores, torch.ones(count, dtype=torch.bool), ratio, torch.Generator().manual_seed(1))
        assert weights.sum().item() == pytest.approx(count)


def test_equal_scores_leave_nothing_out_and_unseen_samples_stay():
    """Constants whose float32 mean is above them, at which the authors' code takes every sample for well learned."""
    for constant in (2.302585, 0.1, 3.0):
        kept, weights = plan_epoch(*everything(*[constant] * 1400), 0.5, torch.Generator())
        assert len(kept) == 1400
        assert (weights == 1).all()
    scores, seen = everything(0.1, 0.2, 0.3, 4.0)
    seen[:2] = False
    kept, _ = plan_epoch(scores, seen, 0.9, torch.Generator())
    assert {0, 1, 3} <= set(kept.tolist())


def test_the_expected_gradient_is_that_of_all_samples_by_enumeration():
    """Over every choice that a plan may make, the mean of the weighted sum of gradients is the full sum."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randint(0, 2, (6,))
    weight = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def gradient(weights):
        losses = F.cross_entropy(x @ weight.T, y, reduction="none")
        return torch.autograd.grad((losses * weights).sum(), weight)[0]

    losses = F.cross_entropy(x @ weight.T, y, reduction="none").detach()
    low = (losses < losses.mean()).nonzero()[:, 0].tolist()
    dropped = round(0.5 * len(low))
    every = []
    for out in combinations(low, dropped):
        weights = torch.ones(6, dtype=torch.float64)
        weights[low] = len(low) / (len(low) - dropped)
        weights[list(out)] = 0
        every.append(gradient(weights))
    torch.testing.assert_close(torch.stack(every).mean(0), gradient(torch.ones(6, dtype=torch.float64)))
    plans = {
        tuple(plan_epoch(losses, losses < 9, 0.5, torch.Generator().manual_seed(s))[1].tolist()) for s in range(99)
    }
    assert len(plans) == len(every)  # each of them is drawn


def test_a_run_of_steps_has_as_many_and_anneals_by_them():
    seen = Seen()
    fit(TinyBlocks(), InfoBatch(0.5, anneal=0.25), epochs=-1, max_steps=16, callbacks=[seen])
    assert len(seen.rates) == 16
    assert seen.batches[1] < STEPS * BATCH  # pruned, in the second epoch


class Reads(TinyBlocks):
    """Logs its loss as people do, and notes what the loss is by itself."""

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        with torch.no_grad():
            logits = self(batch[0])
            each = F.cross_entropy(logits.transpose(1, 2), batch[1], reduction="none").mean(1)
        self.noted = getattr(self, "noted", [])
        self.noted.append((self.trainer.current_epoch, each, loss))
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        read = self.trainer.logged_metrics
        self.noted[-1] += (
            float(outputs["loss"]),
            float(read["train_loss"]),
            float(read["eke/infobatch/weighted_loss"]),
        )


@pytest.mark.parametrize("length", [{"epochs": 3}, {"epochs": -1, "max_steps": 12}])
def test_the_logged_loss_is_the_plain_mean_and_the_weighted_one_has_a_name_of_its_own(length):
    model, technique = Reads(dropout=0.0), InfoBatch(0.5, anneal=0.0)
    plans = []

    class Plans(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            plans.append(technique._weights[technique._samples.batch()])

    fit(model, technique, callbacks=[Plans()], log_every_n_steps=1, **length)
    parted = 0
    for (_, each, *read), weights in zip(model.noted, plans, strict=True):
        assert read[1:3] == pytest.approx([float(each.mean())] * 2, rel=1e-5)
        assert read[3] == pytest.approx(float((each * weights).mean()), rel=1e-5)
        parted += read[3] != pytest.approx(read[2], rel=1e-3)
    assert parted > 0


def test_in_a_run_of_steps_each_step_has_the_gradient_of_all_samples_by_enumeration():
    """Losses so that two of three learned samples stay: over every plan, the mean weighted gradient."""
    scores, seen = everything(0.1, 0.2, 0.3, 2, 3)
    gradients = torch.randn(5, 4, dtype=torch.float64)
    plans = {}
    for number in range(50):
        kept, weights = plan_epoch(scores, seen, 1 / 3, torch.Generator().manual_seed(number))
        plans[tuple(kept.tolist())] = (kept, by_step(weights))
    assert len(plans) == 3
    steps = [(weights[kept, None] * gradients[kept]).mean(0) for kept, weights in plans.values()]
    torch.testing.assert_close(torch.stack(steps).mean(0), gradients.mean(0))
    technique, seen = InfoBatch(0.5, anneal=0.0), []

    class Weights(Callback):
        def on_train_epoch_start(self, trainer, module):
            kept = technique._weights > 0
            seen.append((int(kept.sum()), float(technique._weights[kept].mean())))

    fit(TinyBlocks(), technique, epochs=-1, max_steps=10, callbacks=[Weights()])
    assert seen[1][0] < STEPS * BATCH
    assert [mean for _, mean in seen] == pytest.approx([1.0] * len(seen))


class Seen(Callback):
    def __init__(self):
        self.batches, self.rates, self.validated = {}, [], []

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        self.batches[trainer.current_epoch] = self.batches.get(trainer.current_epoch, 0) + len(batch[0])
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_validation_start(self, trainer, model):
        self.validated.append(trainer.current_epoch)


def test_epochs_shrink_are_validated_each_and_end_in_all_samples():
    seen, count = Seen(), STEPS * BATCH
    fit(TinyBlocks(), InfoBatch(0.5, anneal=0.2), epochs=5, validate=True, callbacks=[seen])
    assert seen.batches[0] == seen.batches[4] == count
    assert all(count // 2 <= seen.batches[epoch] < count for epoch in (1, 2, 3))
    assert seen.validated == [0, 1, 2, 3, 4]


def test_learning_rates_by_step_end_where_they_would_have_ended():
    class Line(TinyBlocks):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            total = 5 * STEPS
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / total))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    paced, plain = Seen(), Seen()
    fit(Line(), InfoBatch(0.5, anneal=0.2), epochs=5, callbacks=[paced])
    fit(Line(), InfoBatch(0.5, anneal=0.2, keep_pace=False), epochs=5, callbacks=[plain])
    assert paced.rates[-1] == pytest.approx(1e-2 / (5 * STEPS))  # one step before the end
    assert plain.rates[-1] > 2 * paced.rates[-1]


def losses_of(technique):
    return {int(i): float(technique._scores[i]) for i in technique._seen.nonzero()[:, 0]}


class Steps(TinyBlocks):
    """Says which samples it saw, with the loss of each, by itself."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        losses = F.cross_entropy(logits.transpose(1, 2), y, reduction="none")
        self.own = losses.mean(1).detach()
        return eke.reduce_loss(losses)


def test_scores_are_the_losses_of_the_samples_and_both_ways_capture_the_same():
    caught, helped = InfoBatch(0.5), InfoBatch(0.5)
    fit(TinyBlocks(), caught, epochs=1)
    fit(Steps(), helped, epochs=1)
    one, other = losses_of(caught), losses_of(helped)
    assert len(one) == STEPS * BATCH
    assert one == pytest.approx(other, rel=1e-5)


def test_a_step_whose_weights_are_one_has_the_users_own_loss():
    plain = fit(TinyViT(), epochs=1).state["steps"]
    captured = fit(TinyViT(), InfoBatch(0.5), epochs=1).state["steps"]
    for name in plain:
        assert captured[name]["loss"] == pytest.approx(plain[name]["loss"], rel=1e-5)


def test_losses_that_cannot_be_followed_back_are_refused_with_what_to_do():
    class Twice(TinyViT):
        def loss(self, batch):
            return super().loss(batch) + super().loss(batch)

    class Other(TinyViT):
        def loss(self, batch):
            return (self(batch[0]) ** 2).mean()

    class Views(TinyViT):
        def loss(self, batch):
            x, y = batch
            return F.cross_entropy(self(torch.cat([x, x.flip(3)])), torch.cat([y, y]))

    class Classes(TinyViT):
        def loss(self, batch):
            return F.cross_entropy(self(batch[0]), batch[1], weight=torch.ones(4))

    for model, said in (
        (Twice, "takes the mean of losses twice, by cross_entropy and by cross_entropy"),
        (Other, "took no mean of losses that could be followed back"),
        (Views, r"got targets of shape \(\d+,\) in a step on \d+ samples: which loss belongs to which sample"),
        (Classes, "and weights of classes, whose samples are not told apart"),
    ):
        with pytest.raises(ValueError, match=said):
            fit(model(), InfoBatch())


def test_data_without_numbers_and_runs_without_epochs_are_refused():
    from lightning.pytorch import Trainer

    class Stream(IterableDataset):
        def __iter__(self):
            return iter([(torch.zeros(3, 8, 8), torch.tensor(0))] * 8)

    quiet = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "enable_progress_bar": False}
    with pytest.raises(ValueError, match="A Stream gives its samples in an order of its own"):
        Trainer(max_epochs=2, limit_train_batches=2, callbacks=[InfoBatch()], **quiet).fit(
            TinyViT(), DataLoader(Stream(), 2)
        )
    data = TensorDataset(torch.zeros(8, 3, 8, 8), torch.zeros(8, dtype=torch.long))
    with pytest.raises(MisconfigurationException, match="needs to know how long the run is"):
        Trainer(max_epochs=-1, callbacks=[InfoBatch()], **quiet).fit(TinyViT(), DataLoader(data, 2))


def test_workers_do_not_mix_up_the_samples():
    scores = []
    for workers in (0, 2):
        technique = InfoBatch(0.5)
        fit(TinyBlocks(), technique, epochs=2, workers=workers)
        scores.append(losses_of(technique))
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"ratio": 1.0}, "ratio=1.0: give a share"),
        ({"start": 0}, "start=0: give epochs"),
        ({"anneal": 2}, "anneal=2: give a share of the run"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments, said):
    with pytest.raises(ValueError, match=said):
        InfoBatch(**arguments)


def test_the_helper_is_a_plain_mean_without_a_technique():
    losses, valid = torch.rand(3, 4), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]])
    torch.testing.assert_close(eke.reduce_loss(losses[0]), losses[0].mean())
    torch.testing.assert_close(eke.reduce_loss(losses, valid), losses[valid.bool()].mean())
    with pytest.raises(ValueError, match=r"losses of shape \(3, 4\) with valid \(4,\)"):
        eke.reduce_loss(losses, torch.ones(4))
