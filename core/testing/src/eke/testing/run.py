"""Trains a tiny model with techniques, takes down every step, and can end the process in mid-run."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from eke import ConflictError, registry
from eke.quiet import quiet
from eke.seams import state
from eke.testing.compare import checksum, copied, local, random_state
from eke.testing.data import BATCH, Loader
from eke.testing.models import STEPS, tensors
from eke.testing.ranks import die, run_alone
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

EPOCHS = 3


@dataclass
class Run:
    """A finished run.

    Args:
        trainer: The Trainer, after ``fit``.
        model: The model, after ``fit``.
        state: Everything that is training state, as plain data: ``weights`` after the run, ``optimizers``,
            ``steps`` (per batch: learning rates, loss, batch, frozen weights, random state, gradient norm),
            ``random`` and ``saved``, which is what a checkpoint at the end of training holds.
    """

    trainer: Trainer
    model: LightningModule
    state: dict[str, Any]


def fit(
    model: LightningModule,
    *techniques: object,
    epochs: int = EPOCHS,
    steps: int = STEPS,
    batch: int = BATCH,
    workers: int = 0,
    seed: int = 0,
    world: int = 1,
    ckpt: str | Path | None = None,
    validate: bool = False,
    loader: Callable[..., Any] = Loader,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> Run:
    """Train ``model`` with ``techniques``; the same call gives the same bits.

    Args:
        model: One of the kit's models; :func:`torch.compile` may be around it.
        techniques: Callbacks, plugins and at most one strategy; each goes to the Trainer argument it belongs to.
        epochs: Epochs to train.
        steps: Batches in an epoch, per process.
        batch: Samples in a batch, per process.
        workers: Loader workers.
        seed: Of the global random states, set before the run.
        world: Number of processes; above 1 to be called under :func:`eke.testing.run_ranks`.
        ckpt: Checkpoint to resume from.
        validate: Whether to validate after each epoch.
        loader: Builds the train loader: the kit's :class:`Loader`, :func:`shuffled`, or a function of their arguments.
        callbacks: Further callbacks, after the techniques.
        options: Passed on to the Trainer.
    """
    recorder = Recorder()
    trainer = make_trainer(*techniques, epochs=epochs, world=world, validate=validate,
                           callbacks=[*callbacks, recorder], **options)  # fmt: skip
    dataset = getattr(model, "_orig_mod", model).dataset(steps * batch * world)
    data = loader(dataset, batch, workers, trainer.global_rank, world)
    seed_everything(seed)
    with quiet():
        trainer.fit(model, data, ckpt_path=ckpt)
    return Run(trainer, trainer.lightning_module, recorder.state(trainer))


def make_trainer(
    *techniques: object,
    epochs: int = EPOCHS,
    world: int = 1,
    validate: bool = False,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> Trainer:
    """Build a silent Trainer on the CPU, with each technique under the argument it belongs to."""
    given: dict[str, Any] = {"callbacks": [], "plugins": []}
    folder = options.get("default_root_dir") or tempfile.mkdtemp(prefix="eke-")
    for technique in techniques:
        argument = registry.trainer_argument(technique)
        if argument == "strategy":
            if argument in given:
                names = f"{type(given[argument]).__name__} and {type(technique).__name__}"
                raise ConflictError(f"{names} are both strategies, and a Trainer takes one. Leave one out.")
            given[argument] = technique
        else:
            given[argument].append(technique)
    given["callbacks"] += callbacks
    defaults = {
        "max_epochs": epochs,
        "accelerator": "cpu",
        "devices": world,
        "logger": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "limit_val_batches": None if validate else 0,
        "use_distributed_sampler": False,  # the kit's loader takes its rank's share itself
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in given["callbacks"]),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    if world > 1 and "strategy" not in given:
        defaults["strategy"] = "ddp"
    with quiet():
        trainer = Trainer(**{**defaults, **given, **options})
    if "default_root_dir" not in options:
        weakref.finalize(trainer, shutil.rmtree, folder, ignore_errors=True)
    return trainer


@dataclass(frozen=True)
class Cut:
    """When a checkpoint is written from which a run goes on: at the end of this many ``epochs``, or after this many
    optimizer ``steps``, or after this many ``batches``, which may be within an accumulation window."""

    epochs: int = 0
    steps: int = 0
    batches: int = 0

    def saves(self, folder: Path) -> tuple[Callback, Path]:
        """The callback that writes it, and the file. One of Lightning's goes on to write others."""
        if self.epochs:
            save = ModelCheckpoint(
                folder, "{epoch}", every_n_epochs=self.epochs, save_on_train_epoch_end=True, **ONE_BY_ONE
            )
            return save, folder / f"{self.epochs - 1}.ckpt"
        if self.steps:
            save = ModelCheckpoint(folder, "{step}", every_n_train_steps=self.steps, **ONE_BY_ONE)
            return save, folder / f"{self.steps}.ckpt"
        file = folder / "cut.ckpt"
        return SaveAfter(file, self.batches), file


ONE_BY_ONE = {"save_top_k": -1, "auto_insert_metric_name": False}  # each in a file of its own


def resume(
    model: Callable[..., LightningModule],
    build: Callable[[], object],
    cuts: Sequence[Cut],
    *,
    killed: bool = True,
    **options: Any,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train once through, and go on from each cut in another process. Return the state of the unbroken run, and those
    of the resumed ones.

    The process that goes on has a model with other initial weights, a new technique object and another global
    seed, so all that is equal came through the checkpoint.

    Args:
        model: Builds the model; called with ``seed``.
        build: Builds the technique, or a list of several.
        cuts: When checkpoints are written, in this order.
        killed: Whether the process that writes them is another one than the unbroken run's, and dies at the last;
            else the unbroken run writes them in passing, and one training is saved.
        options: For :func:`fit`.
    """
    with tempfile.TemporaryDirectory() as folder:
        if killed:
            unbroken = run_alone(lambda: fit(model(seed=0), *_listed(build()), **options).state)
            files = interrupt(folder, model, build, cuts, **options)
        else:
            saves, files = _saving(folder, cuts)
            given = {**options, "callbacks": [*options.get("callbacks", ()), *saves]}
            unbroken = run_alone(lambda: fit(model(seed=0), *_listed(build()), **given).state)
            _written(files)
        resumed = [
            run_alone(lambda file=file: fit(model(seed=1), *_listed(build()), seed=1, ckpt=file, **options).state)
            for file in files
        ]
    return unbroken, resumed


def interrupt(
    folder: str,
    model: Callable[..., LightningModule],
    build: Callable[[], object],
    cuts: Sequence[Cut],
    **options: Any,
) -> list[Path]:
    """Train in a process of its own that writes a checkpoint at each cut, and dies once the last is written. Return the
    files."""
    saves, files = _saving(folder, cuts)
    callbacks = [*options.pop("callbacks", ()), *saves, PowerCut(files[-1])]
    end = run_alone(lambda: fit(model(seed=0), *_listed(build()), callbacks=callbacks, **options).state)
    if end is not None:
        raise AssertionError("the run ended before its checkpoint was written.")
    _written(files)
    return files


def _saving(folder: str, cuts: Sequence[Cut]) -> tuple[list[Callback], list[Path]]:
    saves, files = zip(*(cut.saves(Path(folder, str(number))) for number, cut in enumerate(cuts)), strict=True)
    return list(saves), list(files)


def _written(files: Sequence[Path]) -> None:
    if not all(file.exists() for file in files):
        raise AssertionError("the run ended before its checkpoint was written.")


class PowerCut(Callback):
    """Ends the process before the first batch after a file has appeared."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_epoch_start(self, *_: Any) -> None:
        if self.file.exists():
            die()

    def on_train_batch_start(self, *_: Any) -> None:
        if self.file.exists():
            die()


class SaveAfter(Callback):
    """Saves a checkpoint after a number of batches."""

    def __init__(self, file: Path, batches: int) -> None:
        self.file, self.batches = file, batches

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.batches -= 1
        if self.batches == 0:
            trainer.save_checkpoint(self.file)


class Recorder(Callback):
    """Takes down each step of a run and, at its end, all that is training state."""

    def __init__(self) -> None:
        self.steps: dict[str, dict[str, Any]] = {}
        self.now: dict[str, Any] = {}
        self.weights: dict[str, Any] = {}
        self.end: dict[str, Any] = {}

    def on_train_batch_start(self, trainer: Trainer, model: LightningModule, batch: Any, batch_idx: int) -> None:
        self.now = {
            "batch": checksum(batch),
            "frozen": sorted(name for name, weight in model.named_parameters() if not weight.requires_grad),
            "random state": random_state(),
        }
        self.steps[f"epoch {trainer.current_epoch} batch {batch_idx}"] = self.now

    def on_before_optimizer_step(self, trainer: Trainer, model: LightningModule, optimizer: Any) -> None:
        self.now["learning rate"] = [group["lr"] for one in trainer.optimizers for group in one.param_groups]

    def on_train_batch_end(
        self, trainer: Trainer, model: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        self.now["loss"] = None if loss is None else float(loss)
        # Only of weights that an optimizer steps: nobody clears the gradients of others, they are no training state.
        stepped = [weight for one in trainer.optimizers for group in one.param_groups for weight in group["params"]]
        gradients = [local(weight.grad).norm() for weight in stepped if weight.grad is not None]
        self.now["gradient norm"] = float(torch.stack(gradients).norm()) if gradients else None
        self.weights = {name: copied(tensor) for name, tensor in tensors(model)}

    def on_train_end(self, trainer: Trainer, model: LightningModule) -> None:
        self.end = {
            "optimizers": [copied(optimizer.state_dict()) for optimizer in trainer.optimizers],
            "optimizer classes": [type(optimizer).__qualname__ for optimizer in trainer.optimizers],
            "random": random_state(),
        }
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "end.ckpt")
            trainer.save_checkpoint(path)
            if path.exists():  # only the first rank writes
                self.end["saved"] = training_state(torch.load(path, map_location="cpu", weights_only=False))

    def state(self, trainer: Trainer) -> dict[str, Any]:
        weights = {name: copied(tensor) for name, tensor in tensors(trainer.lightning_module)}
        return {"steps": self.steps, "weights": weights, **self.end}


def _listed(built: object) -> list[object]:
    return built if isinstance(built, list) else [built]


def training_state(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Leave out of a checkpoint what differs between two equal runs: counters of loops, arguments, paths."""
    other = (
        "loops",
        "hparams_name",
        "hyper_parameters",
        "hparams_type",
        "optimizer_states",
        "pytorch-lightning_version",
    )
    kept = {key: value for key, value in checkpoint.items() if key not in other}
    kept["callbacks"] = {
        key: value for key, value in checkpoint.get("callbacks", {}).items() if not key.startswith("ModelCheckpoint")
    }
    return kept


def seed_everything(seed: int) -> None:
    """Seed all random states, and forget a seed that Lightning's function has left in the environment: under DDP a run
    would be seeded by that one."""
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)
    state.seed_everything(seed)
