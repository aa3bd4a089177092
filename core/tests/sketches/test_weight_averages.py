"""A sketch against the core: validation and saved models have an average of the weights."""

import eke
import pytest
import torch
from eke.seams.shards import parameters
from eke.testing import BATCH, Loader, TechniqueContract, TinyBlocks, assert_same, fit, run_ranks
from eke.testing.models import STEPS
from eke.testing.run import make_trainer, quiet, seed_everything
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from sketch_averages import Average
from torch.distributed.fsdp import fully_shard


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(eke, "get", lambda name: Average.technique)


class TestContract(TechniqueContract):
    exceptions = {"test_it_costs_nothing_when_it_has_nothing_to_do": "it takes each step's weights into its mean"}

    zoo = ("gpt2", "t5", "vit", "by_hand")

    def build(self):
        return Average()

    def build_in_zoo(self, animal):
        return Average(start=0.0)


class Sharded(TinyBlocks):
    """Shards itself, as Lightning's own strategy for it wants."""

    def configure_model(self):
        for part in (*self.blocks, self):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


class Saves(Callback):
    def __init__(self, path, after):
        self.path, self.after = path, after

    def on_train_batch_end(self, trainer, *_):
        self.after -= 1
        if self.after == 0:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(("kind", "parts"), [("ema", True), ("lawa", False)], ids=["in parts", "in one file"])
def test_a_sharded_run_saves_its_average_and_resumes_to_the_same_bits(tmp_path, kind, parts):
    path = tmp_path / "cut.ckpt"

    def one(rank, seed=0, callbacks=(), ckpt=None):
        strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=parts)
        average = Average(kind)
        trainer = make_trainer(average, strategy, world=2, validate=True, callbacks=list(callbacks))
        model = Sharded(seed=seed)
        seed_everything(seed)
        data = Loader(model.dataset(2 * STEPS * BATCH), BATCH, 0, rank, 2)
        with quiet():
            trainer.fit(model, data, ckpt_path=ckpt)
        trained = {name: value.full_tensor().tolist() for name, value in parameters(model).items()}
        return trained, {name: value.full_tensor().tolist() for name, value in average.average.weights().items()}

    unbroken = run_ranks(one)
    assert run_ranks(lambda rank: one(rank, callbacks=[Saves(path, 7)])) == unbroken
    assert path.is_dir() == parts
    assert run_ranks(lambda rank: one(rank, seed=1, ckpt=path)) == unbroken

    plain = fit(
        TinyBlocks(),
        alone := Average(kind),
        batch=2 * BATCH,
        callbacks=[Saves(tmp_path / "plain.ckpt", 7)],
    )
    for name, value in alone.average.weights().items():
        torch.testing.assert_close(torch.tensor(unbroken[0][1][name]), value, rtol=0, atol=1e-5)
    if not parts:  # the file is one that a plain model loads, and holds the average
        saved = torch.load(path, weights_only=True)["state_dict"]
        wanted = torch.load(tmp_path / "plain.ckpt", weights_only=True)["state_dict"]
        assert_same(dict(saved), dict(wanted), "weights saved by two processes, then by one", tolerance=1e-5)
        assert not torch.equal(wanted["blocks.0.mlp.fc1.weight"], plain.model.blocks[0].mlp.fc1.weight)
