"""DeepSpeed on two gloo processes. It builds a small C++ part at its first start: g++ and ninja have to be there."""

import shutil

import pytest
import torch
from eke.forecast import ForecastError, forecast
from eke.testing import build_example, run_ranks
from eke.testing import run as kit
from eke.testing.models import TinyBlocks
from eke_zero import ZeRO, ZeROError
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"checkpoint": "full"}, "DeepSpeed writes folders"),
        ({"compute_dtype": "bfloat16"}, "give the Trainer's precision"),
        ({"blocks": "model.layers"}, "has no effect with engine='deepspeed'"),
        ({"reduce_every_batch": True}, "has no effect with engine='deepspeed'"),
        ({"config": {"optimizer": {"type": "Adam"}}}, "would pass configure_optimizers by"),
    ],
)
def test_settings_that_deepspeed_would_ignore_are_refused(settings, words):
    with pytest.raises(ZeROError, match=words):
        ZeRO(engine="deepspeed", **settings)


@pytest.fixture
def engine():
    pytest.importorskip("deepspeed", reason="deepspeed is not installed: make test-deepspeed")
    if not (shutil.which("g++") and shutil.which("ninja")):
        pytest.skip("DeepSpeed builds a part of itself with g++ and ninja, which are not there")
    return {"engine": "deepspeed"}


class Losses(Callback):
    def __init__(self):
        self.all = []

    def on_train_batch_end(self, trainer, model, outputs, *_):
        self.all.append(float(outputs["loss"]))


class Descent(TinyBlocks):
    """Plain gradient descent, to which the length of a gradient matters."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def train(zero=None, model=TinyBlocks, epochs=2, techniques=list, save=None, ckpt=None, seed=0, **options):
    def work(rank):
        strategy = [] if zero is None else [ZeRO(**zero)]
        losses = Losses()
        trainer = kit.make_trainer(*strategy, *techniques(), epochs=epochs, world=2, callbacks=[losses], **options)
        kit.seed_everything(seed)
        with kit.quiet():
            trainer.fit(model(seed=seed), kit.Loader(TinyBlocks.dataset(32), 4, 0, rank, 2), ckpt_path=ckpt)
            if save is not None:
                trainer.save_checkpoint(save)
        return losses.all

    return run_ranks(work, 2)[0]


KINDS = [
    {"stage": 1},
    {"stage": 2},
    {"stage": 3},
    {"stage": 3, "remat": True},
    {"stage": 2, "offload": "optimizer"},
    {"stage": 3, "offload": "params"},
]


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_losses_are_those_of_ddp(engine, settings):
    assert train({**engine, **settings}) == train()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_it_resumes_where_it_was(engine, stage, tmp_path):
    first = train({**engine, "stage": stage}, epochs=1, save=tmp_path / "cut.ckpt")
    assert first + train({**engine, "stage": stage}, ckpt=tmp_path / "cut.ckpt", seed=1) == train()


def test_accumulated_gradients_are_divided_once(engine):
    options = {"model": Descent, "accumulate_grad_batches": 2}
    assert train({**engine, "stage": 2}, **options) == pytest.approx(train(**options), abs=1e-6)


def test_the_trial_leaves_nothing(engine, tmp_path):
    keep = lambda: [ModelCheckpoint(tmp_path, "last", every_n_train_steps=4)]  # noqa: E731
    assert train({**engine, "stage": 2}, techniques=keep) == train()
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("name", ["adam8bit", "stacking"])
def test_techniques_that_it_would_pass_by_are_refused(engine, name):
    with pytest.raises(RuntimeError, match="'zero' imposes '(own optimizer|sharded optimizer)'"):
        train({**engine, "stage": 2}, techniques=lambda: [build_example(name)])


def test_it_is_not_forecast(engine):
    data = TinyBlocks.dataset(4)
    batch = tuple(torch.stack([data[i][part] for i in range(4)]) for part in range(2))
    with pytest.raises(ForecastError, match="cannot follow DeepSpeed"):
        forecast(lambda: (TinyBlocks(), batch), lambda: {"strategy": ZeRO(**engine)}, ranks=2)
