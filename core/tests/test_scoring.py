"""A look at a batch: what it gives, and that it leaves no trace."""

import copy
from collections import namedtuple

import pytest
import torch
from eke.seams.batch import BatchError, rows, size
from eke.seams.losses import LossError, capture
from eke.seams.scores import score
from eke.seams.scoring import error_norms, scoring_pass
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import default_collate
from torchmetrics import MeanMetric

Pair = namedtuple("Pair", "images classes")


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))

    def training_step(self, batch, batch_idx=0):
        loss = F.cross_entropy(self.layers(batch[0]), batch[1])
        self.log("loss", loss)
        return loss


def test_rows_keep_containers_and_take_texts_along():
    batch = {"pair": Pair(torch.arange(8).reshape(4, 2), torch.arange(4)), "texts": ["a", "b", "c", "d"], "scale": 2}
    some = rows(batch, torch.tensor([2, 0, 2]))
    assert isinstance(some["pair"], Pair)
    assert some["texts"] == ["c", "a", "c"]
    assert some["scale"] == 2
    assert some["pair"].classes.tolist() == [2, 0, 2]
    assert some["pair"].images.tolist() == [[4, 5], [0, 1], [4, 5]]
    assert size(batch) == 4


def test_rows_refuse_what_is_not_by_sample():
    with pytest.raises(BatchError, match="first sizes"):
        size([torch.zeros(3), torch.zeros(4)])
    with pytest.raises(BatchError, match="list of 2 entries"):
        rows([torch.zeros(3), ["a", "b"]], torch.tensor([0]))


def test_a_look_leaves_no_trace():
    model = Model()
    model.layers[2].eval()  # a part that the user holds in evaluation mode stays there
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    captured = scoring_pass(
        model, model.training_step, (torch.randn(5, 4, generator=torch.Generator()), torch.arange(5) % 3)
    )
    assert captured.losses.shape == (5,)
    assert not captured.logits.requires_grad
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert "log" not in vars(model)
    assert model.training
    assert model.layers[1].training
    assert not model.layers[2].training
    assert all(weight.grad is None for weight in model.parameters())


def test_a_look_moves_no_metric_and_leaves_no_note():
    class Notes(Model):
        def __init__(self):
            super().__init__()
            self.mean, self.losses, self.steps = MeanMetric(), [], 0

        def training_step(self, batch, batch_idx=0):
            loss = super().training_step(batch, batch_idx)
            self.mean.update(loss)
            self.losses.append(loss)
            self.steps += 1
            self.last = batch[1]
            return loss

    model, batch = Notes(), (torch.randn(5, 4), torch.arange(5) % 3)
    model.mean.update(2.0)
    scoring_pass(model, model.training_step, batch)
    assert (float(model.mean.compute()), model.losses, model.steps, "last" in vars(model)) == (2.0, [], 0, False)


def test_a_module_that_optimizes_by_hand_cannot_be_looked_at():
    model, data = Model(), [(torch.randn(4), torch.tensor(0)) for _ in range(4)]
    model.automatic_optimization = False
    batch = default_collate(data)
    for look in (lambda: scoring_pass(model, model.training_step, batch), lambda: score(model, data, "grand")):
        with pytest.raises(LossError, match=r"Model optimizes by hand.*Let Lightning optimize, or score with a module"):
            look()


def test_a_look_in_training_mode_has_dropout_and_leaves_running_statistics():
    model = Model()
    batch = (torch.randn(64, 4), torch.arange(64) % 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(1)
    captured = scoring_pass(model, model.training_step, batch, training=True)
    torch.manual_seed(1)
    wanted = F.cross_entropy(copy.deepcopy(model.layers)(batch[0]), batch[1], reduction="none")
    assert torch.allclose(captured.losses, wanted)
    assert not torch.allclose(captured.losses, scoring_pass(model, model.training_step, batch).losses)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_gradients_survive_a_look_under_autocast():
    model = Model()
    batch = (torch.randn(6, 4), torch.arange(6) % 3)
    with torch.autocast("cpu", torch.bfloat16):
        scoring_pass(model, model.training_step, batch)
        model.log = lambda *args: None
        model.training_step(batch).backward()
    assert all(weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["classes", "probabilities", "tokens", "flat tokens"])
def test_error_norms_are_the_gradients_by_the_logits(kind, smoothing):
    shape = {"classes": (5, 7), "probabilities": (5, 7), "tokens": (5, 7, 4), "flat tokens": (20, 7)}[kind]
    logits = torch.randn(shape, requires_grad=True)
    if kind == "probabilities":
        target = torch.rand(5, 7).softmax(1)
    else:
        target = torch.randint(7, {"classes": (5,)}.get(kind, (5, 4)))
    if "tokens" in kind:
        target[1, 2:] = -100
    given = target.view(-1) if kind == "flat tokens" else target
    with capture(5, lambda losses: None) as captured:
        F.cross_entropy(logits, given, label_smoothing=smoothing)
    total = F.cross_entropy(logits, given, label_smoothing=smoothing, reduction="sum")
    (gradient,) = torch.autograd.grad(total, logits)
    wanted = gradient.reshape(5, -1).norm(dim=1)
    assert torch.allclose(error_norms(captured), wanted, atol=1e-6)


def test_a_contrastive_loss_is_refused():
    with capture(8, lambda losses: None), pytest.raises(LossError, match="contrastive"):
        F.cross_entropy(torch.randn(8, 8), torch.arange(8))


def test_a_small_batch_that_holds_each_class_once_is_none():
    with capture(3, lambda losses: None) as captured:
        F.cross_entropy(torch.randn(3, 3), torch.arange(3))
    assert captured.losses is not None


def test_losses_without_logits_have_no_error_norms():
    import eke

    with capture(4, lambda losses: None) as captured:
        eke.reduce_loss(torch.rand(4))
    with pytest.raises(LossError, match="plain cross_entropy"):
        error_norms(captured)
