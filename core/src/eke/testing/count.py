"""Counts what a step costs in Python calls and operators: whole numbers that do not vary from run to run."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch import Callback

from eke.measure import OperatorCounter


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
        self.counter = OperatorCounter()
        self.open = False

    def on_train_batch_end(self, *_: Any) -> None:
        self.close()
        self.per_step.append(self.counter.total)
        self.counter.counts.clear()
        self.counter.__enter__()
        self.open = True

    def on_train_epoch_end(self, *_: Any) -> None:
        self.close()

    def on_exception(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        if self.open:
            self.counter.__exit__(None, None, None)
            self.open = False
