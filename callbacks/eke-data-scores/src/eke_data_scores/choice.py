"""The choice of samples by their scores."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from eke import ArgumentError
from eke.seams.scores import ScoresError
from torch import Tensor
from torch.nn import functional as F


def classes_of(dataset: Any) -> Tensor:
    """Class of each sample, (samples,), int64: from ``dataset.targets``, or as the second part of every sample.

    Raises:
        ScoresError: a sample's second part is no whole number.
    """
    targets = getattr(dataset, "targets", None)
    if targets is None:
        targets = []
        for number in range(len(dataset)):
            sample = dataset[number]
            one = sample[1] if isinstance(sample, (list, tuple)) and len(sample) > 1 else None
            if not isinstance(one, (int, np.integer)) and not (
                isinstance(one, Tensor) and one.ndim == 0 and not one.is_floating_point()
            ):
                raise ScoresError(
                    f"balance needs the class of each sample, and the second part of sample {number} is "
                    f"{type(one).__name__}. Give the dataset an attribute targets, or leave balance out."
                )
            targets.append(int(one))
    return torch.as_tensor(targets).long()


def el2n(logits: Tensor, classes: Tensor) -> Tensor:
    """Length of the error vector, (batch,), float32, between 0 and the root of 2: ``||softmax(logits) - onehot||``.

    Args:
        logits: (batch, classes).
        classes: (batch,), int64.

    Source:
        Paul, Ganguli, Dziugaite 2021, definition 2.2.
    """
    wrong = logits.float().softmax(1) - F.one_hot(classes, logits.shape[1])
    return wrong.norm(dim=1)


def choose(
    values: Tensor,
    keep: float,
    mode: Literal["hard", "easy", "random"] = "hard",
    *,
    skip: float = 0.0,
    classes: Tensor | None = None,
    balance: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Numbers of the samples that are kept, rising, int64.

    Args:
        values: Scores, (samples,); higher is harder.
        keep: Share that is kept; ``round(keep * samples)`` of them.
        mode: ``"hard"``: the highest scores. ``"easy"``: the lowest. ``"random"``: the control.
        skip: Share of the samples, the very hardest, that is left out first: wrong labels are among them.
        classes: (samples,), for ``balance``.
        balance: Share of each class's part that is kept in any case: 0.5 keeps half of what a fair share would be.
        seed: For ``"random"``, and for the order of equal scores.

    Raises:
        ValueError: shares outside their range, or more to keep than there are.
    """
    count = len(values)
    if (
        not 0 < keep <= 1
        or not 0 <= skip < 1
        or not 0 <= balance <= 1
        or round(keep * count) > count - round(skip * count)
    ):
        raise ArgumentError(f"keep={keep}, skip={skip}, balance={balance}: give shares that leave enough to keep.")
    if mode not in ("hard", "easy", "random"):
        raise ArgumentError(f"mode={mode!r} is none of: hard, easy, random.")
    if balance and classes is None:
        raise ArgumentError(f"balance={balance} needs the classes of the samples.")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    if mode != "random":
        order = order[values[order].argsort(descending=True, stable=True)]
        order = order[round(skip * count) :]
        order = order.flip(0) if mode == "easy" else order
    wanted = round(keep * count)
    first: list[int] = []
    if balance:
        for one in classes.unique():
            mine = order[classes[order] == one]
            first += mine[: int(balance * keep * int((classes == one).sum()))].tolist()
    sure = set(first)
    rest = [index for index in order.tolist() if index not in sure]
    return torch.tensor((first + rest)[:wanted], dtype=torch.int64).sort().values
