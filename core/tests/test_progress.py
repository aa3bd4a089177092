import eke
import pytest
import torch
from eke.seams.progress import LengthError, Progress, Until
from eke.testing import run_ranks
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)
        self.logged = 0

    def log(self, *args, **kwargs):
        self.logged += 1

    def training_step(self, batch, batch_idx):
        loss = (self.layer(batch[0]).squeeze(1) - batch[1]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


GENERATOR = torch.Generator().manual_seed(2)
X, Y = torch.randn(16, 4, generator=GENERATOR), torch.randn(16, generator=GENERATOR)


def fit(*callbacks, batch=2, **options):
    model = Net()
    silent = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = Trainer(accelerator="cpu", callbacks=list(callbacks), **silent, **{"max_epochs": 1, **options})
    trainer.fit(model, DataLoader(TensorDataset(X, Y), batch_size=batch))
    return model


class Reads(eke.TechniqueCallback):
    technique = eke.Technique(name="reads", kind="callback")
    counts = ("samples", "tokens")

    def __init__(self):
        self.trace = []

    def on_train_batch_start(self, *_):
        self.trace.append((self.progress.steps, self.progress.micro_steps, self.progress.at_boundary))


def test_steps_and_windows_under_accumulation():
    reads = Reads()
    fit(reads, batch=2, accumulate_grad_batches=3)  # 8 batches: windows of 3, 3 and, at the epoch's end, 2
    assert reads.trace == [
        (0, 0, True),
        (0, 1, False),
        (0, 2, False),
        (1, 3, True),
        (1, 4, False),
        (1, 5, False),
        (2, 6, True),
        (2, 7, False),
    ]
    assert reads.progress.steps == 3


def test_samples_and_tokens_of_all_processes_are_counted():
    class Tokens(LightningModule):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(8, 2)

        def training_step(self, batch, batch_idx):
            return self.embed(batch["ids"]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def one(rank):
        reads = Reads()
        data = [{"ids": torch.zeros(5, dtype=torch.long), "labels": torch.zeros(5, dtype=torch.long)}] * 12
        silent = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        parallel = {"devices": 2, "strategy": "ddp"} if rank is not None else {}
        trainer = Trainer(accelerator="cpu", max_epochs=1, callbacks=[reads], **silent, **parallel)
        trainer.fit(Tokens(), DataLoader(data, batch_size=2))
        return reads.progress.samples, reads.progress.tokens

    assert one(None) == (12, 60)
    assert run_ranks(one) == [(12, 60), (12, 60)]


def test_a_strategy_that_accumulates_by_itself_counts_real_steps():
    class Strategy:
        handles_gradient_accumulation = True

    class Run:  # DeepSpeed cannot run here: its counting is what is tested
        strategy, accumulate_grad_batches, global_step = Strategy(), 4, 10

    progress = Progress()
    progress.connect(Run())
    assert progress.steps == 2


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(TensorDataset(X, Y))


class Shares(eke.TechniqueCallback):
    technique = eke.Technique(name="shares", kind="callback")

    def __init__(self, *points):
        self.points, self.seen = points, []

    def check(self, run):
        self.until = [run.until(point, "at") for point in self.points]

    def on_train_batch_start(self, *_):
        self.seen.append((self.progress.share, *(point.reached for point in self.until)))


def test_the_share_of_a_run_by_steps_by_epochs_and_by_what_comes_first():
    by_steps, by_epochs, both = Shares(), Shares(), Shares()
    fit(by_steps, max_epochs=-1, max_steps=4)
    fit(by_epochs, max_epochs=2, accumulate_grad_batches=3)  # windows of 3, 3 and 2 batches: 3 steps an epoch
    fit(both, max_epochs=2, max_steps=4)
    assert [share for (share,) in by_steps.seen] == [0, 1 / 4, 2 / 4, 3 / 4]
    assert [share for (share,) in by_epochs.seen] == [
        step / 6 for step in (0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5)
    ]
    assert [share for (share,) in both.seen] == [0, 1 / 4, 2 / 4, 3 / 4]


def test_a_point_of_a_run_in_every_form():
    at = Shares(3, 0.5, "1 epoch", "0.75 of the run", "6 steps")
    fit(at, max_epochs=2)
    reached = [[i for i, seen in enumerate(at.seen) if seen[1 + number]][0] for number in range(5)]
    assert reached == [3, 8, 8, 12, 6]


def test_how_far_a_point_is_and_its_steps():
    progress = Progress()
    progress._steps = 3
    assert (Until(progress, 4).done, Until(progress, 3).reached, Until(progress, 6).steps) == (0.75, True, 6)
    assert Until(progress, 0).done == 1


@pytest.mark.parametrize("point", [1.5, -1, "soon", "3 fortnights", True, None, "1.5 of the run", float("nan")])
def test_what_is_no_point_of_a_run_is_named(point):
    with pytest.raises(LengthError, match=r"is no point of a run\. Give optimizer steps"):
        Until(Progress(), point)


@pytest.mark.parametrize("limits", [{"max_epochs": 2}, {"max_epochs": -1}])
def test_a_share_of_a_run_of_unknown_length_is_refused_before_the_first_step(limits):
    model, at = Net(), Shares(0.5)
    silent = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = Trainer(accelerator="cpu", callbacks=[at], **silent, **limits)
    with pytest.raises(LengthError, match=r"Shares\(at=0.5\) goes by the length of the run, which is not known"):
        trainer.fit(model, DataLoader(Stream(), batch_size=2))
    assert at.seen == []


def test_only_who_gave_a_point_is_told_that_he_may_give_another():
    for instead in (True, False):
        with pytest.raises(LengthError, match=r"Give Trainer\(max_steps=\.\.\.\)") as error:
            Until(Progress(), 0.5, "Shares", instead).check()
        assert ("a number of optimizer steps in its place" in str(error.value)) == instead


def test_data_without_a_length_is_no_hindrance_to_max_steps_or_a_point_in_steps():
    for point, limits in ((0.5, {"max_steps": 4}), (2, {"max_epochs": 1})):
        at = Shares(point)
        silent = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        trainer = Trainer(accelerator="cpu", callbacks=[at], **silent, **{"max_epochs": -1, **limits})
        trainer.fit(Net(), DataLoader(Stream(), batch_size=2))
        assert [reached for _, reached in at.seen][:4] == [False, False, True, True]


def test_the_share_goes_on_where_it_was_after_a_resume(tmp_path):
    class Kill(Shares):
        def on_train_batch_end(self, trainer, *_):
            if len(self.seen) == 11:
                trainer.save_checkpoint(tmp_path / "a.ckpt")
                raise KeyboardInterrupt

    whole, cut, rest = Shares(), Kill(), Shares()
    fit(whole, max_epochs=2)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(cut, max_epochs=2)
    silent = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = Trainer(accelerator="cpu", max_epochs=2, callbacks=[rest], **silent)
    trainer.fit(Net(), DataLoader(TensorDataset(X, Y), batch_size=2), ckpt_path=tmp_path / "a.ckpt")
    assert cut.seen + rest.seen == whole.seen
