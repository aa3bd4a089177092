"""Takes down what a run does, and breaks it where a case says so."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from eke.testing.compare import checksum, copied, random_state
from eke.testing.run import training_state
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

KEY = "fuzz"  # in a checkpoint: how much of the trace lies before it


class Planned(RuntimeError):
    """The error that a case plans."""


class Trace(Callback):
    """Notes each batch and each validation; at the end, all that is training state.

    Args:
        trained: Batches that a resumed run has behind it.
        validated: Validations that it has behind it.
    """

    def __init__(self, trained: int = 0, validated: int = 0) -> None:
        self.trained, self.validated = trained, validated
        self.began = False  # whether this process has trained a batch
        self.batches: list[dict[str, Any]] = []
        self.validations: list[dict[str, Any]] = []
        self.seen: list[int] = []  # batches of the validation at hand
        self.now: dict[str, Any] = {}
        self.end: dict[str, Any] = {}

    def on_train_batch_start(self, trainer: Trainer, model: LightningModule, batch: Any, batch_idx: int) -> None:
        self.now = {"where": f"epoch {trainer.current_epoch} batch {batch_idx}", "batch": checksum(batch)}

    def on_before_optimizer_step(self, trainer: Trainer, model: LightningModule, optimizer: Any) -> None:
        self.now["learning rate"] = [group["lr"] for one in trainer.optimizers for group in one.param_groups]

    def on_train_batch_end(
        self, trainer: Trainer, model: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        self.now["loss"] = None if loss is None else float(loss)
        self.batches.append(self.now)
        self.began = True
        self.trained += 1

    def on_validation_batch_start(self, trainer: Trainer, model: LightningModule, batch: Any, *args: Any) -> None:
        self.seen.append(checksum(batch))

    def on_validation_end(self, trainer: Trainer, model: LightningModule) -> None:
        seen, self.seen = self.seen, []
        if not trainer.sanity_checking:
            loss = trainer.callback_metrics.get("val_loss")
            self.validations.append({"where": f"after batch {self.trained}", "batches": seen, "loss": copied(loss)})
            self.validated += 1

    def on_save_checkpoint(self, trainer: Trainer, model: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = {"trained": self.trained, "validated": self.validated}

    def on_train_end(self, trainer: Trainer, model: LightningModule) -> None:
        self.end = {
            "schedules": [copied(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
            "random state": random_state(),
            "progress": {"global_step": trainer.global_step, "current_epoch": trainer.current_epoch},
            "metrics": copied(dict(trainer.callback_metrics)),
        }
        path = Path(trainer.default_root_dir, "end.pt")
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:  # the others write nothing
            whole = path if path.is_file() else path / "meta.pt"  # of a sharded one, what is not sharded
            checkpoint = torch.load(whole, map_location="cpu", weights_only=False)
            self.end["optimizers"] = checkpoint.get("optimizer_states", [])
            saved = training_state(checkpoint)
            own = saved.get("eke", {})
            self.end["saved"] = {key: value for key, value in saved.items() if key != "eke"}
            self.end["techniques"] = {key: value for key, value in own.items() if key != "ranks"}

    def state(self, model: LightningModule) -> dict[str, Any]:
        """Everything noted, as plain data."""
        weights = {name: copied(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        return {"batches": self.batches, "validations": self.validations, "weights": weights, **self.end}


class At(Callback):
    """Acts in one hook, the ``at``-th time that it is called."""

    def __init__(self, hook: str, at: int, act: Callable[[Trainer], None]) -> None:
        self.left, self.act = at, act
        setattr(self, hook, self.count)

    def count(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if not trainer.sanity_checking:
            self.left -= 1
            if self.left == 0:
                self.act(trainer)


class StopAfterEpoch(Callback):
    """Stops a run at the end of an epoch, as early stopping does."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: Trainer, model: LightningModule) -> None:
        if trainer.current_epoch + 1 == self.epochs:
            trainer.should_stop = True


def kill(trainer: Trainer) -> None:
    """``kill -9`` of this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail(trainer: Trainer) -> None:
    """An error of the user's code."""
    raise Planned("out of memory, says the case")


def saving(save: Mapping[str, Any], folder: Path) -> list[Callback]:
    """The callbacks by which a case saves, and by which it breaks the run."""
    way, every = save["way"], save.get("every", 1)
    name = "saved-{epoch}-{step}"
    if way == "steps":
        return [ModelCheckpoint(folder, name, every_n_train_steps=every, save_top_k=-1)]
    if way == "epochs":
        return [ModelCheckpoint(folder, name, every_n_epochs=every, save_top_k=-1)]
    if way == "validation":
        return [ModelCheckpoint(folder, name, every_n_epochs=every, save_top_k=-1, save_on_train_epoch_end=False)]
    if way == "hand":
        return [At(save["hook"], save["at"], lambda trainer: trainer.save_checkpoint(folder / "saved.ckpt"))]
    if way == "after fit":
        return [StopAfterEpoch(save["at"])]
    if way == "exception":
        return [
            At(save["hook"], save["at"], fail),
            ModelCheckpoint(folder, name, save_on_exception=True, save_top_k=-1),
        ]
    return [At(save["hook"], save["at"], kill), ModelCheckpoint(folder, name, every_n_train_steps=every, save_top_k=-1)]
