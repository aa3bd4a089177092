"""Scores by a trained model against one gradient a sample, and scores by embedding against closed forms."""

import pytest
import torch
from eke_data_scores import Pruned, Scores, choose, cross_scores, el2n, embed, kmeans, prototypes, redundancy, score
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 3))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen += batch[1].tolist()
        loss = F.cross_entropy(self.layers(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(50, 6, generator=generator), torch.randint(3, (50,), generator=generator))


def test_grand_is_the_gradient_of_each_sample(data):
    model = Classifier()
    found = score(model, data, "grand", batch_size=16)
    weights = {name: value.detach() for name, value in model.layers.named_parameters()}
    layers = nn.Sequential(*(layer for layer in Classifier().layers)).eval()

    def loss(weights, image, label):
        return F.cross_entropy(functional_call(layers, weights, (image[None],)), label[None])

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(weights, *data.tensors)
    wanted = torch.cat([one.flatten(1) for one in gradients.values()], 1).norm(dim=1)
    assert torch.allclose(found.values, wanted.double(), rtol=1e-5)
    assert model.training
    assert all(weight.grad is None for weight in model.parameters())


def test_loss_and_el2n_by_a_trained_model(data):
    model = Classifier()
    logits = model.layers.eval()(data.tensors[0]).detach()
    model.train()
    losses = F.cross_entropy(logits, data.tensors[1], reduction="none")
    assert torch.allclose(score(model, data, batch_size=7).values, losses.double(), atol=1e-6)
    assert torch.allclose(score(model, data, "el2n").values, el2n(logits, data.tensors[1]).double(), atol=1e-6)
    with pytest.raises(ValueError, match="none of"):
        score(model, data, "guess")


class Positional(Classifier):
    """The index of the batch under another name, as Lightning allows it."""

    def training_step(self, batch, i):
        assert isinstance(i, int)
        return super().training_step(batch, i)


class BatchAlone(Classifier):
    def training_step(self, batch):
        return super().training_step(batch, 0)


@pytest.mark.parametrize("kind", ["loss", "el2n", "grand"])
@pytest.mark.parametrize("model", [Positional, BatchAlone])
def test_a_step_is_called_as_lightning_calls_it(data, model, kind):
    wanted = score(Classifier(), data, kind).values
    assert torch.equal(score(model(), data, kind).values, wanted)
    assert cross_scores(lambda half: model(), data, kind).values.allclose(wanted, atol=1e-6)


def test_kmeans_finds_what_lies_apart():
    generator = torch.Generator().manual_seed(0)
    middles = torch.tensor([[0.0, 0], [10, 0], [0, 10], [10, 10]])
    truth = torch.arange(4).repeat(50)
    points = middles[truth] + torch.randn(200, 2, generator=generator) * 0.5
    centroids, nearest = kmeans(points, 4)
    for cluster in range(4):
        assert len(nearest[truth == cluster].unique()) == 1
        assert torch.allclose(centroids[nearest[truth == cluster][0]], points[truth == cluster].mean(0), atol=1e-5)
    assert len(kmeans(torch.zeros(5, 2), 3)[1]) == 5  # equal points are no reason to hang
    with pytest.raises(ValueError, match="clusters of 4 samples"):
        kmeans(torch.zeros(4, 2), 5)


def test_prototypes_call_hard_what_lies_between():
    angles = torch.cat([torch.randn(40, generator=torch.Generator().manual_seed(0)) * 0.02, torch.tensor([0.5])])
    points = torch.stack([angles.cos(), angles.sin()], 1) * 7
    assert prototypes(points, 1).argmax() == 40
    assert torch.allclose(prototypes(points, 1), prototypes(points * 3, 1), atol=1e-6)


def test_redundancy_leaves_one_of_equal_samples():
    generator = torch.Generator().manual_seed(0)
    different = F.normalize(torch.randn(30, 64, generator=generator), dim=1)
    points = torch.cat([different, different[:10] * 2])
    values = redundancy(points, 4)
    kept = choose(values, 30 / 40, "easy")
    assert sorted((kept % 30).tolist()) == list(range(30))
    assert (values > 0.999).sum() == 10


def test_a_chain_of_three_loses_one_sample_with_a_threshold_and_two_without():
    angles = torch.tensor([0.0, 0.3, 0.6])
    points = torch.stack([angles.cos(), angles.sin()], 1)
    from eke_data_scores.embeddings import _alike

    near = float(torch.tensor(0.4).cos())
    assert (_alike(points, None) > near).tolist() == [False, True, True]
    assert (_alike(points, near) > near).tolist() == [False, True, False]


def test_redundancy_in_parts_is_that_of_the_whole(monkeypatch):
    points = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    whole = redundancy(points, 1)
    monkeypatch.setattr("eke_data_scores.embeddings._CHUNK", 7)
    assert torch.allclose(redundancy(points, 1), whole, atol=1e-6)


def test_embeddings_of_another_shape_are_refused(data):
    assert embed(lambda batch: batch[0] * 2, data, batch_size=9).shape == (50, 6)
    with pytest.raises(ValueError, match="Give \\(batch, width\\)"):
        embed(lambda batch: batch[0].mean(1), data)


def test_own_scores_need_a_number_for_each_sample(data):
    with pytest.raises(ValueError, match="one number for each"):
        Scores.of(data, "mine", torch.zeros(49))
    with pytest.raises(ValueError, match="1 that are NaN"):
        Scores.of(data, "mine", torch.tensor([torch.nan] + [0.0] * 49))


def test_a_run_keeps_a_part_of_each_class(tmp_path, data):
    classes = data.tensors[1]
    Scores.of(data, "mine", classes.double()).save(tmp_path / "mine.npz")  # class 2 is hardest

    def seen(balance):
        model = Classifier()
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        pruned = Pruned(tmp_path / "mine.npz", 0.3, balance=balance)
        trainer = Trainer(max_epochs=1, callbacks=[pruned], accelerator="cpu", enable_model_summary=False, **quiet)
        trainer.fit(model, DataLoader(data, 5))
        return torch.tensor(model.seen).bincount(minlength=3)

    assert seen(0.0)[0] == 0
    assert (seen(0.5) >= (0.5 * 0.3 * classes.bincount()).floor()).all()
    assert seen(0.5).sum() == 15


def test_balance_needs_classes(tmp_path):
    data = TensorDataset(torch.randn(20, 6), torch.randn(20))
    Scores.of(data, "mine", torch.rand(20)).save(tmp_path / "mine.npz")
    from eke.seams.scores import ScoresError
    from eke_data_scores.choice import classes_of

    with pytest.raises(ScoresError, match="attribute targets"):
        classes_of(data)
    with pytest.raises(ValueError, match="balance"):
        Pruned("x.npz", balance=1.5)


def test_hard_samples_pay_where_data_abounds_and_easy_ones_where_it_is_scarce():
    """A student perceptron learns from a teacher's labels on 40 % of the samples: Sorscher and others 2022, figure 1.

    Of many samples a dimension the hard ones leave the smaller angle to the teacher, of few the easy ones.
    """

    def angle(per_dimension, mode, seed, width=60, keep=0.4):
        generator = torch.Generator().manual_seed(seed)
        teacher = torch.randn(width, generator=generator, dtype=torch.float64)
        teacher /= teacher.norm()
        inputs = torch.randn(round(per_dimension * width / keep), width, generator=generator, dtype=torch.float64)
        margins = inputs @ teacher
        kept = choose(-margins.abs(), keep, mode, seed=seed)
        signed = inputs[kept] * margins[kept].sign()[:, None]
        student = torch.zeros(width, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([student], max_iter=300, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = F.softplus(-signed @ student).mean() + 1e-5 * student.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        found = student.detach() / student.detach().norm()
        return float(torch.acos((found @ teacher).clamp(-1, 1)))

    def mean(*arguments):
        return sum(angle(*arguments, seed) for seed in range(4)) / 4

    assert mean(1.5, "easy") < mean(1.5, "random") < mean(1.5, "hard")
    assert mean(24, "hard") < mean(24, "easy") < mean(24, "random")
