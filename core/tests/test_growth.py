"""Growth in mid-run, with nothing but the seam: a technique that doubles a list of blocks."""

import copy

import eke
import pytest
import torch
from eke.seams.growth import rebuild
from eke.testing import run_ranks
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.rates = []

    def training_step(self, batch, batch_idx):
        for block in self.blocks:
            batch = batch + block(batch).tanh()
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return batch.square().mean()

    def configure_optimizers(self):
        decayed = [weight for weight in self.parameters() if weight.ndim > 1]
        others = [weight for weight in self.parameters() if weight.ndim == 1]
        optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=1e-2)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.8), "interval": "step"}]


class Doubles(eke.TechniqueCallback):
    technique = eke.Technique(name="doubles", kind="callback", effects=("replaces module tree",))

    def __init__(self, at=3):
        self.at = at
        self.grown = False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.grown and self.progress.steps >= self.at and self.progress.at_boundary:
            rebuild(trainer, self.double(pl_module))

    def double(self, pl_module):
        self.grown = True
        new = [copy.deepcopy(block) for block in pl_module.blocks]
        origin = {
            copied: source
            for block, twin in zip(pl_module.blocks, new, strict=True)
            for source, copied in zip(block.parameters(), twin.parameters(), strict=True)
        }
        pl_module.blocks.extend(new)
        return origin

    def manifest(self):
        return {"grown": self.grown}

    def shape_from(self, manifest, pl_module):
        if manifest["grown"] and not self.grown:
            self.double(pl_module)


class Kill(Callback):
    def __init__(self, path, after):
        self.path, self.after = path, after

    def on_train_batch_end(self, trainer, *_):
        if trainer.fit_loop.total_batch_idx + 1 == self.after:
            trainer.save_checkpoint(self.path)
            raise InterruptedError


DATA = torch.randn(16, 4, generator=torch.Generator().manual_seed(5))


def run(*callbacks, seed=0, ckpt=None, **options):
    torch.manual_seed(seed)
    model, technique = Net(), Doubles()
    silent = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = Trainer(accelerator="cpu", max_epochs=2, callbacks=[technique, *callbacks], **silent, **options)
    try:
        trainer.fit(model, DataLoader(DATA, batch_size=2, shuffle=True), ckpt_path=ckpt)
    except InterruptedError:
        pass
    return model, trainer


def test_state_of_the_copies_is_that_of_their_sources_at_the_growth():
    class Looks(Callback):
        states = None

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            if len(pl_module.blocks) == 4 and self.states is None:
                self.states = [copy.deepcopy(optimizer.state[block.weight]) for block in pl_module.blocks]

    looks = Looks()
    run(looks)
    for low, high in zip(looks.states[:2], looks.states[2:], strict=True):
        torch.testing.assert_close(high, low, rtol=0, atol=0)
        assert low["step"] == 3


def test_the_schedule_goes_on_as_if_nothing_had_happened():
    model, _ = run()
    assert len(model.blocks) == 4
    assert model.rates == pytest.approx([1e-2 * 0.8 ** (step // 2) for step in range(16)])


@pytest.mark.parametrize("after", [2, 3, 4, 6, 8])
def test_a_resume_before_at_and_after_the_growth_ends_at_the_same_weights(tmp_path, after):
    whole, _ = run()
    run(Kill(tmp_path / "cut.ckpt", after))
    rest, _ = run(seed=99, ckpt=tmp_path / "cut.ckpt")
    torch.testing.assert_close(rest.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_growth_waits_for_the_end_of_an_accumulation_window(tmp_path):
    model, trainer = run(accumulate_grad_batches=3)
    assert len(model.blocks) == 4
    run(Kill(tmp_path / "cut.ckpt", 10), accumulate_grad_batches=3)
    rest, _ = run(seed=99, ckpt=tmp_path / "cut.ckpt", accumulate_grad_batches=3)
    torch.testing.assert_close(rest.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_two_processes_grow_together_and_stay_in_step(tmp_path):
    def one(rank, *callbacks, seed=0, ckpt=None):
        model, _ = run(*callbacks, devices=2, strategy="ddp", seed=seed, ckpt=ckpt)
        return [weight.tolist() for weight in model.parameters()]

    whole = run_ranks(one)
    assert whole[0] == whole[1]
    assert len(whole[0]) == 8
    path = tmp_path / "cut.ckpt"
    run_ranks(lambda rank: one(rank, Kill(path, 6)))
    assert run_ranks(lambda rank: one(rank, seed=99, ckpt=path)) == whole


def test_a_grown_model_is_loaded_with_its_shape(tmp_path):
    model, trainer = run()
    trainer.save_checkpoint(tmp_path / "grown.ckpt")
    loaded = eke.load_from_checkpoint(Net, tmp_path / "grown.ckpt", callbacks=[Doubles()])
    assert type(loaded) is Net
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_strategy_that_shards_is_refused():
    class Sharded:
        strategy = object()

    with pytest.raises(MisconfigurationException, match="cannot follow.*Use one device or strategy='ddp'"):
        rebuild(Sharded(), {})
