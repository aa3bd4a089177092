"""LoRA+: the second matrix of each pair at a higher learning rate, without the schedule or checkpoints knowing.

Source: Hayou, Ghosh, Yu 2024, https://arxiv.org/abs/2402.12354.
"""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer


class Apart:
    """Before a step: parameters of a group apart, those of second matrices at a higher learning rate.

    Args:
        second: ``id`` of each second matrix.
        ratio: Of their learning rate to that of the others.
    """

    def __init__(self, second: set[int], ratio: float) -> None:
        self.second, self.ratio = second, ratio

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        optimizer.eke_groups = optimizer.param_groups
        optimizer.param_groups = [
            {**group, "params": [p for p in group["params"] if (id(p) in self.second) == later],
             "lr": group["lr"] * (self.ratio if later else 1)}
            for group in optimizer.param_groups for later in (False, True)
        ]  # fmt: skip


def join(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """After a step: groups as they were, for schedules and checkpoints."""
    optimizer.param_groups = optimizer.eke_groups
    del optimizer.eke_groups
