"""However a checkpoint came about, the resumed run is the one that was not cut: a table of ways by options."""

import functools
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from eke import ResumeError, RunError
from eke.seams.samples import Samples, SamplesError
from eke.spec import Technique
from eke.technique import TechniqueCallback
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
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


class Picks(TechniqueCallback):
    """Another part of the samples in each epoch."""

    technique = Technique(name="picks", kind="callback", effects=("replaces samples",))

    def __init__(self):
        self.samples = Samples()
        self.noted = torch.zeros(SAMPLES)

    def alter_loader(self, run, loader):
        return self.samples.attach(run, loader)

    def begin_samples(self, run):
        self.samples.begin()

    def on_train_epoch_start(self, trainer, pl_module):
        self.samples.begin()

    def around_step(self, run, call_next, batch, *args):
        self.noted[self.samples.batch()] += 1
        return call_next(batch, *args)

    def on_train_epoch_end(self, trainer, pl_module):
        kept = torch.randperm(SAMPLES, generator=self.generator)[: 5 + trainer.current_epoch]
        self.samples.kept = torch.zeros(SAMPLES).index_fill(0, kept, 1).bool()

    def state_dict(self):
        return {"samples": self.samples.state_dict(), "noted": self.noted}

    def load_state_dict(self, state):
        self.samples.load_state_dict(state["samples"])
        self.noted = state["noted"]


class Net(LightningModule):
    """Notes each batch with its learning rate, and each validation with its loss; dropout draws at random."""

    def __init__(self, schedule=None, breaks=None, statistics=False):
        super().__init__()
        norm = [nn.BatchNorm1d(8)] if statistics else []
        self.register_buffer("steps", torch.zeros(()))
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
        self.steps = self.steps + 1  # another tensor, as in many models
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
            self.events.append(
                ("validation", self.trainer.global_step, self.trainer.callback_metrics["val_loss"].item())
            )

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=getattr(self, "lr", None) or 1e-2)
        return {"optimizer": optimizer, **({} if self.schedule is None else {"lr_scheduler": self.schedule(optimizer)})}


class ByHand(Net):
    """Accumulates over two batches by itself."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx) / 2)
        if self.trainer.fit_loop.total_batch_idx % 2:
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
        generator, skip = self.sampler.generator, 0
        if self.waiting is not None:
            within = self.waiting["place"] < len(self)
            skip = self.waiting["place"] if within else 0
            generator.set_state(self.waiting["begun" if within else "now"])
            self.waiting = None
        self.begun, self.place = generator.get_state(), 0
        return self._rest(super().__iter__(), skip)

    def _rest(self, batches, skip):
        for batch in batches:
            self.place += 1
            if self.place > skip:
                yield batch

    def state_dict(self):
        return {"place": self.place, "begun": self.begun, "now": self.sampler.generator.get_state()}

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


AFTER = (
    "`save_checkpoint` after `fit`, fewer epochs",
    "`save_checkpoint` after `fit`, fewer steps",
    "`save_checkpoint` after `fit`, resumed with `max_steps`",
)
BY_STEPS_NOW = "`ModelCheckpoint` by steps under `max_epochs`, resumed with `max_steps`"

OPTIONS = [
    Option("nothing"),
    Option("val_check_interval=0.5", {"val_check_interval": 0.5}),
    Option("val_check_interval=3 over epochs", {"val_check_interval": 3, "check_val_every_n_epoch": None}),
    Option("check_val_every_n_epoch=2", {"check_val_every_n_epoch": 2}),
    Option(
        "accumulation, ragged at the end",
        {"accumulate_grad_batches": 2},
        module=functools.partial(Net, statistics=True),
    ),
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
    Option(
        "StochasticWeightAveraging",
        callbacks=lambda: [StochasticWeightAveraging(5e-3, 2, 1)],
        not_with={
            **dict.fromkeys(AFTER, "it has put its average in place of the weights when `fit` ends"),
            BY_STEPS_NOW: "it goes by `max_epochs`",
        },
    ),
    Option(
        "EarlyStopping",
        callbacks=lambda: [EarlyStopping("val_loss", patience=2)],
        not_with={AFTER[1]: "Lightning tells it that an epoch has ended where `max_steps` ends the run"},
    ),
    Option("precision='64-true'", {"precision": "64-true"}),
    Option("precision='bf16-mixed'", {"precision": "bf16-mixed"}),
    Option("optimized by hand over two batches", module=ByHand),
    Option("a callback that draws", callbacks=drawing),
    Option("samples chosen by epoch", technique=Picks),
    Option("samples chosen, reloaded", {"reload_dataloaders_every_n_epochs": 1}, reloads=True, technique=Picks),
    Option("samples chosen, a loader that keeps its place", loader=Stateful, technique=Picks),
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


class Terminate(Callback):
    """Has the process told to end while it trains on a batch, as clusters do."""

    def __init__(self, batches):
        self.batches = batches

    def on_train_batch_start(self, trainer, *_):
        if trainer.fit_loop.total_batch_idx + 1 == self.batches:
            os.kill(os.getpid(), signal.SIGTERM)


class ByName(ModelCheckpoint):
    """Lightning's, with the path of the first file that it writes from a number of batches on."""

    def __init__(self, path, batches=0, **options):
        super().__init__(path.parent, path.stem + "-{step}", save_top_k=-1, **options)
        self.path, self.batches = path, batches

    def _save_checkpoint(self, trainer, filepath):
        if trainer.fit_loop.total_batch_idx + 1 >= self.batches and not self.path.exists():
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


def _each(path, **options):
    return [ByName(path, **options), Stop(path)]


def _failing(path):
    return [ByName(path, save_on_exception=True, every_n_epochs=100)]


def step(batches):
    return lambda path: _each(path, batches=batches, every_n_train_steps=1)


WAYS = [
    Way("`ModelCheckpoint` by steps, within an epoch", step(7)),
    Way("`ModelCheckpoint` by steps, at an epoch's last batch", step(10)),
    Way(
        "`ModelCheckpoint` after each validation",
        lambda path: _each(path, batches=6, every_n_epochs=1, save_on_train_epoch_end=False),
    ),
    Way("`ModelCheckpoint` at an epoch's end", lambda path: _each(path, batches=6, save_on_train_epoch_end=True)),
    Way(AFTER[0], trainer={"max_epochs": 2}, after=True),
    Way(AFTER[1], trainer={"max_steps": 7, "max_epochs": -1}, after=True),
    Way(
        BY_STEPS_NOW,
        step(10),
        resumed={"max_steps": 18, "max_epochs": -1},
    ),
    Way(
        AFTER[2],
        trainer={"max_epochs": 2},
        resumed={"max_steps": 18, "max_epochs": -1},
        after=True,
    ),
    Way("a callback in `on_train_batch_end`", lambda path: [SaveIn(path, "on_train_batch_end", 7)], first=True),
    Way(
        "a callback in `on_train_batch_end`, last batch",
        lambda path: [SaveIn(path, "on_train_batch_end", 10)],
        first=True,
    ),
    Way("a callback in `on_train_epoch_end`", lambda path: [SaveIn(path, "on_train_epoch_end", 2)], first=True),
    Way("a callback in `on_train_epoch_start`", lambda path: [SaveIn(path, "on_train_epoch_start", 3)], first=True),
    Way("a callback in `on_before_optimizer_step`", lambda path: [SaveIn(path, "on_before_optimizer_step", 6)]),
    Way("a callback in `on_validation_start`", lambda path: [SaveIn(path, "on_validation_start", 2)]),
    Way("a callback in `on_validation_end`", lambda path: [SaveIn(path, "on_validation_end", 2)], first=True),
    Way("an error in `training_step`, `save_on_exception`", _failing, Breaks("step", 7)),
    Way("an error in backward, `save_on_exception`", _failing, Breaks("backward", 7)),
    Way("an error in validation, `save_on_exception`", _failing, Breaks("validation", 10)),
    Way("Ctrl-C in `training_step`, `save_on_exception`", _failing, Breaks("step", 8, KeyboardInterrupt)),
    Way("SIGTERM, `save_on_exception`", lambda path: [*_failing(path), Terminate(8)]),
    Way("SIGTERM in an epoch's last batch, `save_on_exception`", lambda path: [*_failing(path), Terminate(10)]),
]


def name(value):
    return value.name.replace("`", "")


def type_of(value):
    return type(value).__name__


def pairs(slow):
    """In the everyday tests each way meets some options, and each option some ways; the rest is slow."""
    found = []
    for i, way in enumerate(WAYS):
        for j, option in enumerate(OPTIONS):
            everyday = (i + 3 * j) % 8 == 0 or j == 0
            if way.name not in option.not_with and slow != everyday:
                found.append((way, option))
    return found


# ------------------------------------------------------------------ the comparison


def run(option, callbacks=(), first=False, seed=0, ckpt=None, breaks=None, loader_of_module=False, **more):
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
    if loader_of_module:
        module.lr, module.batch_size = None, BATCH
    if option.reloads or loader_of_module:
        module.train_dataloader, module.val_dataloader = lambda: option.loader(), lambda: option.validation()
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


def plain(state):
    """Without what is not there, which cannot be compared."""
    return {key: plain(one) if isinstance(one, dict) else one for key, one in state.items() if one is not None}


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
    assert 0 < before <= len(cut.events), (before, len(cut.events), len(rest.events), rest.events[:3])
    joined = cut.events[:before] + rest.events
    differ = next((i for i, (a, b) in enumerate(zip(joined, unbroken.events, strict=True)) if a != b), None)
    assert differ is None, (
        f"event {differ} of {len(joined)}, {before} of them before: {joined[differ]}, {unbroken.events[differ]}"
    )
    assert len(cut.events) - before <= 2, "the file lies too far back"
    torch.testing.assert_close(rest.state_dict(), unbroken.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(plain(technique.state_dict()), plain(kept.state_dict()), rtol=0, atol=0)
    for mine, theirs in zip(ended.optimizers, done.optimizers, strict=True):
        torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    for mine, theirs in zip(ended.lr_scheduler_configs, done.lr_scheduler_configs, strict=True):
        assert mine.scheduler.state_dict() == theirs.scheduler.state_dict(), mine.scheduler.state_dict()
    assert ended.current_epoch == done.current_epoch
    assert ended.global_step == done.global_step


# ------------------------------------------------------------------ in words

# Where a resumed run is not the unbroken one bit for bit, and why.
NAMED = {
    "workers that are kept from epoch to epoch (`persistent_workers=True`) and draw random numbers": "what they have "
    "drawn lives in them. Without `persistent_workers` each epoch's are seeded anew, and the seed is kept",
    "`LightningModule.on_train_batch_end`": "Lightning writes files of steps before it calls it. What moves there is "
    "better moved in `on_before_zero_grad` or in a callback",
    "a loader that has its own `state_dict` and draws from the global random state only when its first batch is asked "
    "for": "the draw comes once more where the run goes on. Give it a generator",
    "torchmetrics that are logged by epoch, in the epoch in which the run goes on": "they keep their own states, and "
    "see the rest of the epoch. Plain values that are logged are kept",
    "`ModelCheckpoint` and validation by wall-clock time": "time passes otherwise",
    "a checkpoint written within a batch whose weights have moved already": "that batch is trained on again; it is "
    "said when the file is written",
    "a technique's tensors above 1 MiB, or all where weights are sharded, in a file that is written within a batch": ""
    "they are not copied at each batch, and are saved as they are",
    "`LearningRateFinder` and `BatchSizeFinder` in the run that resumes": "refused: Lightning then drops the "
    "checkpoint's optimizer state and counters",
    "another number of processes": "weights, optimizer and schedules go on; the order of the data and the random "
    "numbers are new ones, which is said",
}


def table():
    lines = ["| the checkpoint was written by | the resumed run is the unbroken one |", "| --- | --- |"]
    for way in WAYS:
        without = [f"not with {one.name}: {one.not_with[way.name]}" for one in OPTIONS if way.name in one.not_with]
        lines.append(f"| {way.name} | {'; '.join(without) or 'yes'} |")
    lines += ["", "Each way is tested with each of: " + "; ".join(one.name for one in OPTIONS[1:]) + ".", ""]
    lines += ["Not bit for bit, or not at all:", ""]
    return "\n".join(lines + [f"- {what}: {why}." for what, why in NAMED.items()])


# ------------------------------------------------------------------ the claims


@pytest.mark.parametrize(("way", "option"), pairs(slow=False), ids=name)
def test_a_run_resumed_from_it_sees_the_batches_and_ends_at_the_weights_of_an_unbroken_one(tmp_path, way, option):
    check(tmp_path, way, option)


@pytest.mark.slow
@pytest.mark.parametrize(("way", "option"), pairs(slow=True), ids=name)
def test_so_it_does_in_each_other_pair_of_a_way_and_an_option(tmp_path, way, option):
    check(tmp_path, way, option)


def test_the_readme_lists_these_ways_and_options():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    listed = readme.partition("<!-- ways -->\n")[2].partition("<!-- end of ways -->")[0]
    assert listed.strip() == table(), f"write core/README.md anew: python {Path(__file__).name}"


def test_a_run_is_the_same_after_learning_rates_were_tried_out_before_it(tmp_path):
    """It replaces the only train loader, and tries it without the techniques' hooks."""
    option = next(one for one in OPTIONS if one.name == "samples chosen by epoch")
    finder = LearningRateFinder(num_training_steps=4)
    module, technique, trainer = run(option, [finder], loader_of_module=True, default_root_dir=tmp_path)
    assert trainer.current_epoch == 4
    assert technique.noted.sum() == 10 + 5 + 6 + 7  # what the epochs saw, and not what was tried out
    assert len([one for one in module.events if one[0] == "validation"][-4:]) == 4


def test_batch_sizes_are_not_tried_out_where_samples_are_chosen(tmp_path):
    option = next(one for one in OPTIONS if one.name == "samples chosen by epoch")
    with pytest.raises(RunError, match="BatchSizeFinder runs a few steps.*Find the batch size without"):
        run(option, [BatchSizeFinder(max_trials=2)], loader_of_module=True, default_root_dir=tmp_path)


def test_a_finder_in_a_run_that_resumes_is_refused(tmp_path):
    path = tmp_path / "cut.ckpt"
    run(OPTIONS[0], step(7)(path))
    with pytest.raises(ResumeError, match="LearningRateFinder tries out.*Leave LearningRateFinder out"):
        run(OPTIONS[0], [LearningRateFinder(num_training_steps=4)], ckpt=path, loader_of_module=True)


def test_two_loaders_together_are_still_too_many_for_chosen_samples():
    option = Option("", loader=lambda: CombinedLoader({"a": shuffled(), "b": shuffled()}), technique=Picks)
    with pytest.raises(SamplesError, match="several train loaders"):
        run(option)


def test_a_checkpoint_of_a_batch_whose_weights_have_moved_says_so(tmp_path):
    class Late(ByHand):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            if self.trainer.fit_loop.total_batch_idx == 3:
                self.trainer.save_checkpoint(tmp_path / "cut.ckpt")

    with pytest.warns(UserWarning, match="in the middle of a batch whose weights have moved.*on_train_batch_end"):
        run(Option("", module=Late))
    rest, _, trainer = run(Option("", module=ByHand), ckpt=tmp_path / "cut.ckpt")
    assert rest.events[0][1:3] == (0, 3)  # that batch again
    assert trainer.current_epoch == 4


def test_a_trainer_without_eke_goes_on_from_the_file(tmp_path):
    path = tmp_path / "cut.ckpt"
    run(OPTIONS[0], step(7)(path))
    module = Net()
    silent = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    Trainer(accelerator="cpu", max_epochs=4, **silent).fit(module, shuffled(), ckpt_path=path)
    assert module.trainer.global_step > 7


if __name__ == "__main__":
    readme = Path(__file__).parents[1] / "README.md"
    before, _, rest = readme.read_text().partition("<!-- ways -->\n")
    after = rest.partition("<!-- end of ways -->")[2]
    readme.write_text(f"{before}<!-- ways -->\n{table()}\n<!-- end of ways -->{after}")
