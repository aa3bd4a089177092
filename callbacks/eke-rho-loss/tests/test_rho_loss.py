"""What is chosen, that labels at random are not, and the file of losses."""

import pytest
import torch
from eke import EkeError
from eke.seams.scores import Scores
from eke_rho_loss import RhoLoss, cross_scores, reducible
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class Classifier(LightningModule):
    def __init__(self, rate=0.1):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.rate = nn.Linear(6, 3), rate
        self.seen = []

    def training_step(self, batch, batch_idx):
        if torch.is_grad_enabled():
            self.seen += batch[2].tolist()
        return F.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.rate)


@pytest.fixture
def data():
    """400 samples of which the first 80 have a wrong label."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(400, 6, generator=generator)
    classes = inputs[:, :3].argmax(1)
    classes[:80] = (classes[:80] + torch.randint(1, 3, (80,), generator=generator)) % 3
    return TensorDataset(inputs, classes, torch.arange(400))


def train(dataset):
    model = Classifier()
    Trainer(max_epochs=20, enable_checkpointing=False, **QUIET).fit(model, DataLoader(dataset, 20, shuffle=True))
    return model


def fit(technique, data, epochs=3, **options):
    model = Classifier()
    loader = DataLoader(data, 40, shuffle=not isinstance(data, IterableDataset))
    Trainer(max_epochs=epochs, callbacks=[technique], enable_checkpointing=False, **QUIET).fit(model, loader, **options)
    return model


def test_the_choice_is_that_of_the_largest_differences():
    losses, irreducible = torch.tensor([3.0, 1.0, 2.0, 0.5]), torch.tensor([2.9, 0.1, 0.2, 0.4])
    assert reducible(losses, irreducible, 2).tolist() == [1, 2]
    assert reducible(losses, irreducible + 7, 2).tolist() == [1, 2]  # a constant changes nothing
    assert reducible(losses, torch.zeros(4), 2).tolist() == [0, 2]  # the highest losses


def test_crossed_losses_are_of_the_model_that_has_not_seen_the_sample(data):
    halves = []

    def remember(half):
        halves.append({int(half[i][2]) for i in range(len(half))})
        return train(half)

    found = cross_scores(remember, data)
    assert halves[0] | halves[1] == set(range(400))
    assert not halves[0] & halves[1]
    assert found.values[:80].mean() > 2 * found.values[80:].mean()
    first = train(torch.utils.data.Subset(data, sorted(halves[0])))
    inputs, classes, _ = data.tensors
    losses = F.cross_entropy(first.layer(inputs), classes, reduction="none").double()
    other = sorted(halves[1])
    assert torch.corrcoef(torch.stack([losses[other], found.values[other]]).detach())[0, 1] > 0.95


def test_wrong_labels_are_left_out_where_the_highest_losses_take_them(tmp_path, data):
    cross_scores(train, data).save(tmp_path / "irreducible.npz")
    chosen = torch.tensor(fit(RhoLoss(tmp_path / "irreducible.npz", 0.25), data, 8).seen)
    highest = torch.tensor(fit(RhoLoss("zero", 0.25), data, 8).seen)
    assert len(chosen) == len(highest) == 8 * 100
    assert (chosen < 80).float().mean() < 0.2 < (highest < 80).float().mean()


def test_a_run_resumes_to_the_same_bits(tmp_path, data):
    cross_scores(train, data).save(tmp_path / "irreducible.npz")
    whole = fit(RhoLoss(tmp_path / "irreducible.npz", 0.25), data)
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=7, save_top_k=-1, filename="{step}")
    Trainer(max_epochs=1, callbacks=[RhoLoss(tmp_path / "irreducible.npz", 0.25), saving], **QUIET).fit(
        Classifier(), DataLoader(data, 40, shuffle=True)
    )
    again = fit(RhoLoss(tmp_path / "irreducible.npz", 0.25), data, ckpt_path=tmp_path / "step=7.ckpt")
    assert torch.equal(whole.layer.weight, again.layer.weight)


def test_files_of_other_scores_or_data_and_streams_are_refused(tmp_path, data):
    Scores.of(data, "el2n", torch.rand(400)).save(tmp_path / "el2n.npz")
    with pytest.raises(ValueError, match="holds el2n scores"):
        fit(RhoLoss(tmp_path / "el2n.npz"), data)
    Scores.of(data, "loss", torch.full((400,), torch.inf)).save(tmp_path / "inf.npz")
    with pytest.raises(ValueError, match="finite"):
        fit(RhoLoss(tmp_path / "inf.npz"), data)
    other = TensorDataset(*(part[:200] for part in data.tensors))
    Scores.of(other, "loss", torch.rand(200)).save(tmp_path / "other.npz")
    with pytest.raises(ValueError, match="other data"):
        fit(RhoLoss(tmp_path / "other.npz"), data)
    with pytest.raises(ValueError, match="no file of scores"):
        fit(RhoLoss(tmp_path / "none.npz"), data)

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(data)

    with pytest.raises(ValueError, match="map-style"):
        fit(RhoLoss(tmp_path / "el2n.npz"), Stream())
    assert len(fit(RhoLoss("zero", 0.25), Stream(), 1).seen) == 100  # the highest losses need no numbers


@pytest.mark.parametrize("look", ["evaluation", "training"])
def test_the_look_is_in_the_mode_that_is_asked_for(data, look):
    modes = []

    class Modes(Classifier):
        def training_step(self, batch, i):
            modes.append((torch.is_grad_enabled(), self.layer.training))
            return super().training_step(batch, i)

    options = {"max_steps": 2, "callbacks": [RhoLoss("zero", 0.25, look=look)], "enable_checkpointing": False}
    Trainer(**options, **QUIET).fit(Modes(), DataLoader(data, 40))
    assert modes == [(False, look == "training"), (True, True)] * 2


def test_arguments_outside_their_range_are_refused():
    with pytest.raises(ValueError, match="keep=0"):
        RhoLoss("zero", 0)
    with pytest.raises(ValueError, match="look='eval' is none of: evaluation, training"):
        RhoLoss("zero", look="eval")
    with pytest.raises(EkeError):
        RhoLoss("zero", 0)


def test_the_logged_loss_is_the_mean_of_the_whole_batch_and_that_of_the_chosen_has_a_name_of_its_own(data):
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

    options = {"max_steps": 3, "callbacks": [RhoLoss("zero", 0.25)], "log_every_n_steps": 1}
    Trainer(enable_checkpointing=False, **options, **QUIET).fit(Reads(rate=0.0), DataLoader(data, 40))
    assert len(read) == 3
    for whole, chosen, logged in read:
        assert logged["train_loss"] == pytest.approx(whole, rel=1e-5)
        assert logged["eke/rho_loss/chosen_loss"] == pytest.approx(chosen, rel=1e-5)
        assert chosen > whole * 1.01
