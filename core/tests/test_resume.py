"""The data and state seams together: a run that is killed and resumed is the run that was not."""

import pytest
import torch
from eke.seams.data import IndexTap
from eke.seams.state import rng_state, set_rng_state
from eke.spec import Technique
from eke.technique import TechniqueCallback
from eke.testing import run_ranks
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler


class Net(LightningModule):
    """Takes down which samples came, and draws from the global random state by dropout."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.seen = []

    def training_step(self, batch, batch_idx):
        parts = list(batch.values()) if isinstance(batch, dict) else [batch]
        self.seen.append([part[:, 0].tolist() for part in parts])
        return sum(self.net(part).square().mean() for part in parts)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9), "interval": "step"}]


class Noisy(Dataset):
    """Augments at random where it runs: in the main process or in a worker."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.full((4,), float(index)) + torch.rand(1)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(40.0).view(10, 4))


class Draws(TechniqueCallback):
    technique = Technique(name="draws", kind="callback", effects=("changes loss",))

    def __init__(self):
        self.drawn = []
        self.clocks = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.drawn.append(torch.rand(1, generator=self.generator).item())
        self.clocks.append((self.progress.steps, self.progress.micro_steps, self.progress.at_boundary))


class Kill(Callback):
    def __init__(self, path, batches=None, epoch=None):
        self.path, self.batches, self.epoch = path, batches, epoch

    def stop(self, trainer):
        trainer.save_checkpoint(self.path)
        raise InterruptedError

    def on_train_batch_end(self, trainer, *_):
        if trainer.fit_loop.total_batch_idx + 1 == self.batches:
            self.stop(trainer)

    def on_train_epoch_end(self, trainer, *_):
        if trainer.current_epoch == self.epoch:
            self.stop(trainer)


TENSORS = torch.randn(10, 4, generator=torch.Generator().manual_seed(5))


def weighted():
    return DataLoader(TENSORS, batch_size=2, sampler=WeightedRandomSampler([1.0] * 5 + [3.0] * 5, 10))


LOADERS = {
    "shuffled": lambda: DataLoader(TENSORS, batch_size=2, shuffle=True),
    "with a generator": lambda: DataLoader(TENSORS, batch_size=2, shuffle=True, generator=torch.Generator()),
    "weighted sampler": weighted,
    "augmented": lambda: DataLoader(Noisy(), batch_size=2, shuffle=True),
    "augmented by workers": lambda: DataLoader(Noisy(), batch_size=2, shuffle=True, num_workers=2),
    "persistent workers": lambda: DataLoader(
        TENSORS, batch_size=2, shuffle=True, num_workers=1, persistent_workers=True
    ),
    "iterable": lambda: DataLoader(Stream(), batch_size=2),
    "two together": lambda: CombinedLoader({"a": weighted(), "b": DataLoader(TENSORS, 2, shuffle=True)}, "min_size"),
}


def run(loader, *callbacks, seed=0, ckpt=None, technique=Draws, **options):
    torch.manual_seed(seed)
    model, technique = Net(), technique()
    silent = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    length = {} if "max_steps" in options else {"max_epochs": 3}
    trainer = Trainer(accelerator="cpu", callbacks=[technique, *callbacks], **silent, **length, **options)
    try:
        trainer.fit(model, loader, ckpt_path=ckpt)
    except InterruptedError:
        pass
    return model, technique


def assert_resumes(make_loader, path, batches=None, epoch=None, **options):
    whole, whole_technique = run(make_loader(), **options)
    cut, _ = run(make_loader(), Kill(path, batches, epoch), **options)
    rest, rest_technique = run(make_loader(), seed=99, ckpt=path, **options)
    done = len(cut.seen)
    assert 0 < done < len(whole.seen)
    assert cut.seen + rest.seen == whole.seen
    assert rest_technique.drawn == whole_technique.drawn[done:]
    assert rest_technique.clocks == whole_technique.clocks[done:]
    torch.testing.assert_close(rest.state_dict(), whole.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("when", [{"batches": 3}, {"batches": 7}, {"epoch": 1}], ids=str)
@pytest.mark.parametrize("loader", LOADERS)
def test_a_resumed_run_sees_the_batches_and_ends_at_the_weights_of_an_unbroken_one(tmp_path, loader, when):
    assert_resumes(LOADERS[loader], tmp_path / "cut.ckpt", **when)


@pytest.mark.parametrize("when", [{"batches": 5}, {"batches": 10}, {"epoch": 0}], ids=str)
@pytest.mark.parametrize("options", [{"max_steps": 13}, {"accumulate_grad_batches": 2}], ids=str)
def test_it_does_at_the_edge_of_an_epoch_too(tmp_path, when, options):
    assert_resumes(LOADERS["shuffled"], tmp_path / "cut.ckpt", **when, **options)


def test_an_accumulation_window_that_was_cut_in_two_keeps_its_first_half(tmp_path):
    assert_resumes(LOADERS["shuffled"], tmp_path / "cut.ckpt", batches=3, accumulate_grad_batches=2)


def test_a_run_whose_epochs_were_too_few_goes_on_from_the_file_saved_after_it(tmp_path):
    whole, _ = run(LOADERS["shuffled"]())
    torch.manual_seed(0)
    model = Net()
    silent = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = Trainer(accelerator="cpu", callbacks=[Draws()], max_epochs=2, **silent)
    trainer.fit(model, LOADERS["shuffled"]())
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    rest, _ = run(LOADERS["shuffled"](), seed=99, ckpt=tmp_path / "after.ckpt")
    assert model.seen + rest.seen == whole.seen
    torch.testing.assert_close(rest.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_a_trainer_without_us_goes_on_from_the_middle_of_an_epoch(tmp_path):
    path = tmp_path / "killed.ckpt"
    run(LOADERS["shuffled"](), Kill(path, batches=7))
    torch.manual_seed(3)
    silent = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = Trainer(accelerator="cpu", max_epochs=3, **silent)
    trainer.fit(Net(), LOADERS["shuffled"](), ckpt_path=path)
    assert trainer.global_step == 15


def test_the_data_order_of_a_run_is_the_one_it_has_without_us():
    torch.manual_seed(0)
    plain = Net()
    silent = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    Trainer(accelerator="cpu", max_epochs=3, **silent).fit(plain, LOADERS["shuffled"]())
    ours, _ = run(LOADERS["shuffled"]())
    assert ours.seen == plain.seen
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_two_processes_resume_with_their_own_random_numbers_and_their_own_samples(tmp_path):
    def ranks(*callbacks, seed=0, ckpt=None):
        def one(rank):
            options = {"devices": 2, "strategy": "ddp"}
            model, _ = run(LOADERS["shuffled"](), *callbacks, seed=seed + rank, ckpt=ckpt, **options)
            return model.seen, [weight.tolist() for weight in model.parameters()]

        return run_ranks(one)

    for when in ({"batches": 2}, {"epoch": 0}):
        path = tmp_path / f"{when}.ckpt"
        whole = ranks()
        cut = ranks(Kill(path, **when))
        rest = ranks(seed=50, ckpt=path)
        for rank in (0, 1):
            assert cut[rank][0] + rest[rank][0] == whole[rank][0]
            assert rest[rank][1] == whole[rank][1]
        assert whole[0][0] != whole[1][0]


def test_another_number_of_processes_goes_on_and_says_so(tmp_path, caplog):
    path = tmp_path / "cut.ckpt"

    def one(rank):
        run(LOADERS["shuffled"](), Kill(path, batches=2), devices=2, strategy="ddp")

    run_ranks(one)
    with caplog.at_level("INFO"):
        model, _ = run(LOADERS["shuffled"](), ckpt=path)
    assert model.seen
    assert "written by 2 processes and this run has 1" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_the_tap_names_the_samples_of_each_batch(workers):
    class Taps(Draws):
        def alter_loader(self, run, loader):
            self.tap = IndexTap(loader)
            return loader

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.drawn.append((self.tap.at(batch_idx), batch[:, 0].tolist()))

    loader = DataLoader(TENSORS, batch_size=3, shuffle=True, num_workers=workers)
    _, technique = run(loader, technique=Taps)
    assert len(technique.drawn) == 12
    for indices, values in technique.drawn:
        assert TENSORS[indices, 0].tolist() == values
    technique.tap.remove()
    assert type(loader.batch_sampler).__name__ == "BatchSampler"


def test_the_random_state_comes_back_whole():
    import random

    import numpy

    state = rng_state()
    first = (random.random(), numpy.random.rand(), torch.rand(1).item(), random.gauss(0, 1), numpy.random.randn())
    set_rng_state(state)
    assert first == (
        random.random(),
        numpy.random.rand(),
        torch.rand(1).item(),
        random.gauss(0, 1),
        numpy.random.randn(),
    )
