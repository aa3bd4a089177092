"""Lightning's hooks, forwarded to the techniques that have one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Hooks(Callback):
    """Each hook calls those who have one, in order."""

    def __init__(self) -> None:
        self.listeners: dict[str, list[Callable[..., Any]]] = {hook: [] for hook in HOOKS}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for listener in self.listeners["on_fit_start"]:
            listener(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for listener in self.listeners["on_fit_end"]:
            listener(trainer, pl_module)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for listener in self.listeners["on_sanity_check_start"]:
            listener(trainer, pl_module)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for listener in self.listeners["on_sanity_check_end"]:
            listener(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for listener in self.listeners["on_train_start"]:
            listener(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for listener in self.listeners["on_train_end"]:
            listener(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for listener in self.listeners["on_train_epoch_start"]:
            listener(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for listener in self.listeners["on_train_epoch_end"]:
            listener(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        for listener in self.listeners["on_train_batch_start"]:
            listener(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for listener in self.listeners["on_train_batch_end"]:
            listener(trainer, pl_module, outputs, batch, batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        for listener in self.listeners["on_before_backward"]:
            listener(trainer, pl_module, loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for listener in self.listeners["on_after_backward"]:
            listener(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        for listener in self.listeners["on_before_optimizer_step"]:
            listener(trainer, pl_module, optimizer)

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        for listener in self.listeners["on_before_zero_grad"]:
            listener(trainer, pl_module, optimizer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for listener in self.listeners["on_validation_start"]:
            listener(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for listener in self.listeners["on_validation_end"]:
            listener(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for listener in self.listeners["on_validation_epoch_start"]:
            listener(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for listener in self.listeners["on_validation_epoch_end"]:
            listener(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        for listener in self.listeners["on_validation_batch_start"]:
            listener(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        for listener in self.listeners["on_validation_batch_end"]:
            listener(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for listener in self.listeners["on_test_start"]:
            listener(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for listener in self.listeners["on_test_end"]:
            listener(trainer, pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for listener in self.listeners["on_test_epoch_start"]:
            listener(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for listener in self.listeners["on_test_epoch_end"]:
            listener(trainer, pl_module)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        for listener in self.listeners["on_test_batch_start"]:
            listener(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        for listener in self.listeners["on_test_batch_end"]:
            listener(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for listener in self.listeners["on_predict_start"]:
            listener(trainer, pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for listener in self.listeners["on_predict_end"]:
            listener(trainer, pl_module)

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for listener in self.listeners["on_predict_epoch_start"]:
            listener(trainer, pl_module)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for listener in self.listeners["on_predict_epoch_end"]:
            listener(trainer, pl_module)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        for listener in self.listeners["on_predict_batch_start"]:
            listener(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        for listener in self.listeners["on_predict_batch_end"]:
            listener(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for listener in self.listeners["on_save_checkpoint"]:
            listener(trainer, pl_module, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for listener in self.listeners["on_load_checkpoint"]:
            listener(trainer, pl_module, checkpoint)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        for listener in self.listeners["on_exception"]:
            listener(trainer, pl_module, exception)


HOOKS = tuple(name for name in vars(Hooks) if name.startswith("on_"))
