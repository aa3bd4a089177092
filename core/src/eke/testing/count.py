"""Counts what a step costs in Python calls and operators: whole numbers that do not vary from run to run."""

from __future__ import annotations

import sys
from typing import Any

import torch
from lightning.pytorch import Callback
from torch.utils._python_dispatch import TorchDispatchMode


class CountCalls(Callback):
    """Python functions entered between the ends of two batches, for each batch after the first."""

    def __init__(self) -> None:
        self.per_step: list[int] = []
        self.count = 0

    def on_train_batch_end(self, *_: Any) -> None:
        sys.setprofile(None)
        self.per_step.append(self.count)
        self.count = 0
        sys.setprofile(self.see)

    def on_train_epoch_end(self, *_: Any) -> None:
        sys.setprofile(None)  # between epochs other work is done

    def see(self, frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            self.count += 1

    def on_exception(self, *_: Any) -> None:
        sys.setprofile(None)


class CountOperators(Callback):
    """ATen operators dispatched between the ends of two batches, for each batch after the first."""

    def __init__(self) -> None:
        self.per_step: list[int] = []
        self.mode = _Operators()
        self.open = False

    def on_train_batch_end(self, *_: Any) -> None:
        self.close()
        self.per_step.append(self.mode.count)
        self.mode.count = 0
        self.mode.__enter__()
        self.open = True

    def on_train_epoch_end(self, *_: Any) -> None:
        self.close()

    def on_exception(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        if self.open:
            self.mode.__exit__(None, None, None)
            self.open = False


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> torch.Tensor:
        self.count += 1
        return func(*args, **(kwargs or {}))
