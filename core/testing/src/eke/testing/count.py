"""Counts what a step costs in Python calls and operators: whole numbers that do not vary from run to run."""

from __future__ import annotations

import sys
from typing import Any

from eke.measure import OperatorCounter
from lightning.pytorch import Callback


class Count(Callback):
    """Counts from the end of each batch to the end of the next one, within an epoch.

    Attributes:
        per_step: One number a batch, without the first of each epoch.
    """

    def __init__(self) -> None:
        self.per_step: list[int] = []
        self.counting = False

    def start(self) -> None:
        raise NotImplementedError

    def stop(self) -> int:
        raise NotImplementedError

    def on_train_batch_end(self, *_: Any) -> None:
        if self.counting:
            self.per_step.append(self.stop())
        self.counting = True
        self.start()

    def on_train_epoch_end(self, *_: Any) -> None:
        if self.counting:
            self.stop()
        self.counting = False

    on_exception = on_train_epoch_end


class CountCalls(Count):
    """Python functions entered."""

    count = 0

    def start(self) -> None:
        self.count = 0
        sys.setprofile(self.see)

    def stop(self) -> int:
        sys.setprofile(None)
        return self.count

    def see(self, frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            self.count += 1


class CountOperators(Count):
    """ATen operators dispatched, those of backward and of the optimizer included."""

    def start(self) -> None:
        self.counter = OperatorCounter()
        self.counter.__enter__()

    def stop(self) -> int:
        self.counter.__exit__(None, None, None)
        return self.counter.total
