"""However a checkpoint came about, the resumed run is the one that was not cut: a table of ways by options."""

import functools
import signal
from dataclasses import dataclass, field

import pytest
import torch
from eke.spec import Technique
from eke.technique import TechniqueCallback
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, WeightedRandomSampler

SAMPLES, BATCH = 10, 2  # five batches an epoch: windows of two leave a ragged one
TENSORS = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(5))


class Broken(RuntimeError):
    """What ends a run in these tests."""


class Idle(TechniqueCallback):
    """A technique that changes nothing, and keeps count."""

    technique = Technique(name="idle", kind="callback", effects=("changes loss",))

    def __init__(self):
        self.batches = self.epochs = 0
        self.drawn = 0.0

    def around_step(self, run, call_next, batch, *args):
        self.drawn = torch.rand(1, generator=run.generator).item()
        return call_next(batch, *args)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches += 1

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs += 1

    def state_dict(self):
        return {"batches": self.batches, "epochs": self.epochs, "drawn": self.drawn}

    def load_state_dict(self, state):
        self.batches, self.epochs, self.drawn = state["batches"], state["epochs"], state["drawn"]


class Net(LightningModule):
    """Notes each batch with its learning rate, and each validation with its loss; dropout draws at random."""

    def __init__(self, schedule=None, breaks=None, statistics=False):
        super().__init__()
        norm = [nn.BatchNorm1d(8)] if statistics else []
        self.net = nn.Sequential(nn.Linear(4, 8), *norm, nn.Dropout(0.3), nn.Linear(8, 1))
        self.schedule, self.breaks = schedule, breaks
        self.events = []

    def loss(self, batch):
        parts = list(batch.values()) if isinstance(batch, dict) else [batch]
        return sum(self.net(part.to(self.net[0].weight.dtype)).square().mean() for part in parts)

    def training_step(self, batch, batch_idx):
        parts = list(batch.values()) if isinstance(batch, dict) else [batch]
        seen = [part[:, 0].tolist() for part in parts]
        rate = self.optimizers().param_groups[0]["lr"]
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        if self.breaks is not None and self.breaks.at(self, "step"):
            self.breaks.now()
        if self.breaks is not None and self.breaks.at(self, "backward"):
            self.net[0].weight.register_hook(lambda grad: self.breaks.now())
        self.events.append(("step", self.trainer.current_epoch, batch_idx, self.trainer.global_step, rate, seen))
        return loss

    def validation_step(self, batch, batch_idx):
        if self.breaks is not None and not self.trainer.sanity_checking and self.breaks.at(self, "validation"):
            self.breaks.now()
        self.log("val_loss", self.loss(batch) + torch.rand(1).item())

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.events.append(("validation", self.trainer.global_step, self.trainer.callback_metrics["val_loss"].item()))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return {"optimizer": optimizer, **({} if self.schedule is None else {"lr_scheduler": self.schedule(optimizer)})}


class ByHand(Net):
    """Accumulates over two batches by itself."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx) / 2)
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


@dataclass
class Breaks:
    """Lets a run end by an error, at its ``count``-th batch or so."""

    where: str
    count: int
    error: type = Broken

    def at(self, module, where):
        return where == self.where and sum(one[0] == "step" for one in module.events) >= self.count

    def now(self):
        raise self.error("on purpose")


# ------------------------------------------------------------------ data


class Noisy(Dataset):
    """Augments at random: by the global random state, which each worker has of its own."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return TENSORS[index] + torch.rand(1)


class OwnGenerator(Noisy):
    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)

    def __getitem__(self, index):
        return TENSORS[index] + torch.rand(1, generator=self.generator)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(TENSORS + torch.rand(1))


class Blocks(BatchSampler):
    """Batches in an order of its own generator."""

    def __init__(self):
        super().__init__(range(SAMPLES), BATCH, False)
        self.rng = torch.Generator().manual_seed(3)

    def __iter__(self):
        order = torch.randperm(SAMPLES, generator=self.rng).tolist()
        return iter([order[i : i + BATCH] for i in range(0, SAMPLES, BATCH)])


class Plain:
    """An iterable that is no DataLoader."""

    def __iter__(self):
        return iter(TENSORS[torch.randperm(SAMPLES)].split(BATCH))

    def __len__(self):
        return SAMPLES // BATCH


class Stateful(DataLoader):
    """Keeps its own place, as torchdata's loader does, by what its sampler gives."""

    def __init__(self):
        super().__init__(TENSORS, BATCH, sampler=RandomSampler(TENSORS, generator=torch.Generator().manual_seed(1)))
        self.place, self.skip, self.begun, self.waiting = 0, 0, None, None

    def __iter__(self):
        generator = self.sampler.generator
        if self.waiting is not None:
            generator.set_state(self.waiting["begun"])
        skip, self.waiting = (0 if self.waiting is None else self.waiting["place"] % len(self)), None
        self.begun, self.place = generator.get_state(), 0
        for batch in super().__iter__():
            self.place += 1
            if self.place > skip:
                yield batch

    def state_dict(self):
        return {"place": self.place, "begun": self.begun}

    def load_state_dict(self, state):
        self.waiting = state


def shuffled(**options):
    return DataLoader(TENSORS, BATCH, shuffle=True, **options)


def together():
    short = DataLoader(TENSORS[:4], BATCH, sampler=WeightedRandomSampler([1.0, 2.0, 3.0, 4.0], 4))
    return CombinedLoader({"a": shuffled(), "b": short}, "max_size_cycle")


# ------------------------------------------------------------------ options


@dataclass
class Option:
    """Of a run. ``gate`` names the ways that it is paired with in the everyday tests: all, or some."""

    name: str
    trainer: dict = field(default_factory=dict)
    loader: object = shuffled
    validation: object = functools.partial(DataLoader, TENSORS, 5)
    schedule: object = None
    callbacks: object = list
    module: object = Net
    reloads: bool = False
    gate: tuple = ()
    not_with: dict = field(default_factory=dict)  # ways in which it does not hold, with the reason
    technique: object = Idle


def every(scheduler, interval="epoch", **more):
    return lambda optimizer: {"scheduler": scheduler(optimizer), "interval": interval, **more}


def cosine(optimizer):
    return lr_scheduler.CosineAnnealingLR(optimizer, 4)


def plateau(optimizer):
    return lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=0.5)


def drawing():
    class Drawing(Callback):
        """Of the user's own: draws at random where epochs begin, and where training does."""

        def on_train_start(self, trainer, pl_module):
            torch.rand(3)

        def on_train_epoch_start(self, trainer, pl_module):
            torch.rand(2)

    return [Drawing()]


OPTIONS = [
    Option("nothing"),
    Option("val_check_interval=0.5", {"val_check_interval": 0.5}),
    Option("val_check_interval=3 over epochs", {"val_check_interval": 3, "check_val_every_n_epoch": None}),
    Option("check_val_every_n_epoch=2", {"check_val_every_n_epoch": 2}),
    Option("accumulation, ragged at the end", {"accumulate_grad_batches": 2}, module=functools.partial(Net, statistics=True)),
    Option("cosine by epoch", schedule=every(cosine)),
    Option("steps every second epoch", schedule=every(lambda one: lr_scheduler.StepLR(one, 1, 0.5), frequency=2)),
    Option("plateau of the validation", schedule=every(plateau, monitor="val_loss")),
    Option("plateau of the training", schedule=every(plateau, monitor="train_loss")),
    Option(
        "plateau by step",
        {"val_check_interval": 2},
        schedule=every(plateau, "step", monitor="val_loss", frequency=2, strict=False),
    ),
    Option("two workers", loader=lambda: DataLoader(Noisy(), BATCH, shuffle=True, num_workers=2)),
    Option(
        "persistent workers",
        loader=lambda: shuffled(num_workers=1, persistent_workers=True),
        validation=lambda: DataLoader(TENSORS, 5, shuffle=True, num_workers=1, persistent_workers=True),
    ),
    Option("reloaded every epoch", {"reload_dataloaders_every_n_epochs": 1}, reloads=True),
    Option("reloaded every second epoch", {"reload_dataloaders_every_n_epochs": 2}, reloads=True),
    Option("data without length", loader=lambda: DataLoader(Stream(), BATCH)),
    Option("an iterable of one's own", loader=Plain),
    Option("a loader that keeps its place", loader=Stateful),
    Option("two loaders, the shorter in a circle", loader=together),
    Option("the data set's own generator", loader=lambda: DataLoader(OwnGenerator(), BATCH, shuffle=True)),
    Option("the batch sampler's own generator", loader=lambda: DataLoader(TENSORS, batch_sampler=Blocks())),
    Option("limit_train_batches=3", {"limit_train_batches": 3}),
    Option("max_steps", {"max_steps": 18, "max_epochs": -1}),
    Option("overfit_batches=3", {"overfit_batches": 3}),
    Option("GradientAccumulationScheduler", callbacks=lambda: [GradientAccumulationScheduler({0: 1, 1: 2, 2: 3})]),
    Option("StochasticWeightAveraging", callbacks=lambda: [StochasticWeightAveraging(5e-3, 2, 1)]),
    Option("EarlyStopping", callbacks=lambda: [EarlyStopping("val_loss", patience=2)]),
    Option("precision='64-true'", {"precision": "64-true"}),
    Option("precision='bf16-mixed'", {"precision": "bf16-mixed"}),
    Option("optimized by hand over two batches", module=ByHand),
    Option("a callback that draws", callbacks=drawing),
]

# ------------------------------------------------------------------ ways


class Stop(Callback):
    """Ends the run once the file is there."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_start(self, trainer, *_):
        if self.path.exists():
            raise Broken


class SaveIn(Callback):
    """Saves in one hook, in the ``count``-th call of it, and ends the run."""

    def __init__(self, path, hook, count):
        self.path, self.count, self.calls = path, count, 0
        setattr(self, hook, self._save)

    def _save(self, trainer, *_):
        self.calls += not trainer.sanity_checking
        if self.calls == self.count and not self.path.exists():
            trainer.save_checkpoint(self.path)
            raise Broken


class ByName(ModelCheckpoint):
    """Lightning's, with the path of the first file that it writes."""

    def __init__(self, path, nth=1, **options):
        super().__init__(path.parent, path.stem + "-{step}", save_top_k=-1, **options)
        self.path, self.nth, self.written = path, nth, 0

    def _save_checkpoint(self, trainer, filepath):
        if not self.path.exists():
            self.written += 1
            if self.written >= self.nth:
                super()._save_checkpoint(trainer, str(self.path))


@dataclass
class Way:
    """How a checkpoint comes about."""

    name: str
    callbacks: object = lambda path: []
    breaks: Breaks | None = None
    trainer: dict = field(default_factory=dict)  # of the run that is cut
    resumed: dict = field(default_factory=dict)  # of the run that goes on
    after: bool = False  # saved by hand, after fit
    first: bool = False  # the callbacks stand before the technique
    holds: str = "yes"


def _each(path, **options):
    return [ByName(path, **options), Stop(path)]


def _failing(path):
    return [ByName(path, save_on_exception=True, every_n_epochs=100)]


def step(number):
    return lambda path: _each(path, every_n_train_steps=number)


WAYS = [
    Way("ModelCheckpoint by steps, within an epoch", step(7)),
    Way("ModelCheckpoint by steps, at an epoch's last batch", step(10)),
    Way("ModelCheckpoint after each validation", lambda path: _each(path, nth=2, every_n_epochs=1)),
    Way("ModelCheckpoint at an epoch's end", lambda path: _each(path, nth=2, save_on_train_epoch_end=True)),
    Way("save_checkpoint after fit, fewer epochs", trainer={"max_epochs": 2}, after=True),
    Way("save_checkpoint after fit, fewer steps", trainer={"max_steps": 7, "max_epochs": -1}, after=True),
    Way(
        "ModelCheckpoint by steps under max_epochs, resumed with max_steps",
        step(10),
        resumed={"max_steps": 18, "max_epochs": -1},
    ),
    Way("save_checkpoint after fit, resumed with max_steps", trainer={"max_epochs": 2}, resumed={"max_steps": 18, "max_epochs": -1}, after=True),
    Way("a callback in on_train_batch_end", lambda path: [SaveIn(path, "on_train_batch_end", 7)], first=True),
    Way("a callback in on_train_batch_end, last batch", lambda path: [SaveIn(path, "on_train_batch_end", 10)], first=True),
    Way("a callback in on_train_epoch_end", lambda path: [SaveIn(path, "on_train_epoch_end", 2)], first=True),
    Way("a callback in on_train_epoch_start", lambda path: [SaveIn(path, "on_train_epoch_start", 3)], first=True),
    Way("a callback in on_before_optimizer_step", lambda path: [SaveIn(path, "on_before_optimizer_step", 6)]),
    Way("a callback in on_validation_start", lambda path: [SaveIn(path, "on_validation_start", 2)]),
    Way("a callback in on_validation_end", lambda path: [SaveIn(path, "on_validation_end", 2)], first=True),
    Way("an error in training_step, save_on_exception", _failing, Breaks("step", 7)),
    Way("an error in backward, save_on_exception", _failing, Breaks("backward", 7)),
    Way("an error in validation, save_on_exception", _failing, Breaks("validation", 10)),
    Way("Ctrl-C in training_step, save_on_exception", _failing, Breaks("step", 8, KeyboardInterrupt)),
]


def name(value):
    return value.name


def pairs(slow):
    found = []
    for way in WAYS:
        for option in OPTIONS:
            found.append((way, option))
    return found if not slow else []


# ------------------------------------------------------------------ the comparison


def run(option, callbacks=(), first=False, seed=0, ckpt=None, breaks=None, keep=None, **more):
    torch.manual_seed(seed)
    module, technique = option.module(schedule=option.schedule, breaks=breaks), option.technique()
    listed = [*callbacks, technique] if first else [technique, *callbacks]
    options = {"max_epochs": 4, **option.trainer, **more}
    silent = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[*option.callbacks(), *listed],
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in listed),
        **silent,
        **options,
    )
    if option.reloads:
        module.train_dataloader, module.val_dataloader = option.loader, option.validation
        loaders = ()
    else:
        loaders = (option.loader(), option.validation())
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(module, *loaders, ckpt_path=ckpt, weights_only=None)
    except (Broken, SystemExit):
        pass
    finally:
        signal.signal(signal.SIGINT, handler)
    return module, technique, trainer


_whole = {}


def whole(option):
    if option.name not in _whole:
        _whole[option.name] = run(option)
    return _whole[option.name]


def check(folder, way, option):
    unbroken, kept, done = whole(option)
    path = folder / "cut.ckpt"
    cut, _, trainer = run(option, way.callbacks(path), way.first, breaks=way.breaks, **way.trainer)
    if way.after:
        trainer.save_checkpoint(path)
    assert path.exists(), "the way wrote no file"
    torch.rand(5)
    rest, technique, ended = run(option, seed=99, ckpt=path, **way.resumed)
    if way.resumed:  # as far as the unbroken run had come by then
        unbroken, kept, done = run(option, **way.resumed)
    before = len(unbroken.events) - len(rest.events)
    assert 0 < before <= len(cut.events)
    assert cut.events[:before] + rest.events == unbroken.events
    assert len(cut.events) - before <= 2, "the file lies too far back"
    torch.testing.assert_close(rest.state_dict(), unbroken.state_dict(), rtol=0, atol=0)
    assert technique.state_dict() == kept.state_dict()
    for mine, theirs in zip(ended.optimizers, done.optimizers, strict=True):
        torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    for mine, theirs in zip(ended.lr_scheduler_configs, done.lr_scheduler_configs, strict=True):
        assert mine.scheduler.state_dict() == theirs.scheduler.state_dict()
    assert ended.current_epoch == done.current_epoch
    assert ended.global_step == done.global_step


# ------------------------------------------------------------------ the claims


@pytest.mark.parametrize("way, option", pairs(slow=False), ids=name)
def test_a_run_resumed_from_it_sees_the_batches_and_ends_at_the_weights_of_an_unbroken_one(tmp_path, way, option):
    check(tmp_path, way, option)


@pytest.mark.slow
@pytest.mark.parametrize("way, option", pairs(slow=True), ids=name)
def test_so_it_does_in_each_other_pair_of_a_way_and_an_option(tmp_path, way, option):
    check(tmp_path, way, option)
