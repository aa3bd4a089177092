"""Scores of samples as a file that says which data it is of, and the choice of samples by them."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_FORMAT = 1


class ScoresError(ValueError):
    """A file holds no scores, or scores of other data."""


@dataclass(frozen=True)
class Scores:
    """One number for each sample of a dataset; higher is harder.

    Attributes:
        kind: What they are: ``"el2n"``, ``"forgetting"``, ``"loss"``, ``"grand"``, or any name of your own.
        values: (samples,), float64; the mean over runs. ``inf`` for a sample that was never learned.
        runs: How many runs they are the mean of.
        data: Fingerprint of the dataset, see :func:`fingerprint`.
    """

    kind: str
    values: Tensor
    runs: int
    data: str

    @classmethod
    def of(cls, dataset: Any, kind: str, values: Tensor) -> Scores:
        """Numbers that you computed yourself, such as distances in an embedding.

        Args:
            dataset: What they are of.
            kind: A name for them.
            values: (samples,), higher is harder.

        Raises:
            ScoresError: not one number for each sample, or one that is NaN.
        """
        if values.shape != (len(dataset),) or bool(values.isnan().any()):
            raise ScoresError(
                f"Scores of {len(dataset)} samples have shape {tuple(values.shape)} and "
                f"{int(values.isnan().sum())} that are NaN. Give one number for each sample."
            )
        return cls(kind, values.detach().double().cpu(), 1, fingerprint(dataset))

    def save(self, file: str | Path) -> None:
        """Write them whole or not at all: a reader never meets half a file."""
        file = Path(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        about = json.dumps({"format": _FORMAT, "kind": self.kind, "runs": self.runs, "data": self.data})
        part = file.with_name(f".{file.name}.part")
        with open(part, "wb") as stream:
            checksum = zlib.crc32(self.values.numpy().tobytes())
            np.savez(stream, values=self.values.numpy(), about=np.array(about), checksum=np.array(checksum))
        os.replace(part, file)

    @classmethod
    def load(cls, file: str | Path) -> Scores:
        """Read what :meth:`save` wrote.

        Raises:
            ScoresError: no such file, one that is cut short or of another kind.
        """
        try:
            with np.load(file, allow_pickle=False) as stored:
                values, about, checksum = stored["values"], json.loads(str(stored["about"])), int(stored["checksum"])
        except FileNotFoundError:
            raise ScoresError(f"There is no file of scores at {file}. A run with Score(file=...) writes one.") from None
        except Exception as error:
            raise ScoresError(f"{file} is no file of scores, or is cut short: {error}.") from error
        if about.get("format") != _FORMAT or zlib.crc32(values.tobytes()) != checksum:
            raise ScoresError(f"{file} is damaged, or of another version: its checksum does not agree.")
        return cls(about["kind"], torch.from_numpy(values), about["runs"], about["data"])

    def merged(self, other: Scores) -> Scores:
        """The mean over the runs of both.

        Raises:
            ScoresError: of another kind, or of other data.
        """
        if (self.kind, self.data) != (other.kind, other.data):
            raise ScoresError(
                f"Scores {self.kind} of data {self.data} and {other.kind} of {other.data} have no mean. Use two files."
            )
        runs = self.runs + other.runs
        return Scores(self.kind, (self.values * self.runs + other.values * other.runs) / runs, runs, self.data)


def fingerprint(dataset: Any) -> str:
    """What tells one dataset from another: its length and a checksum of 16 samples, spread evenly.

    Samples that random augmentation changes have no checksum; then the length alone is taken, which is said by a ``?``.
    """
    count = len(dataset)
    places = sorted({round(i * (count - 1) / 15) for i in range(16)})
    first, second = ([_checksum(dataset[place]) for place in places] for _ in range(2))
    return f"{count}-{zlib.crc32(repr(first).encode()):08x}" if first == second else f"{count}-?"


def check_data(scores: Scores, dataset: Any, file: Any) -> None:
    """Refuse scores of other data.

    Raises:
        ScoresError: the fingerprints differ.
    """
    found = fingerprint(dataset)
    same = scores.data == found if "?" not in scores.data + found else scores.data.split("-")[0] == found.split("-")[0]
    if not same:
        raise ScoresError(
            f"{file} holds scores of other data: its fingerprint is {scores.data}, that of the training data {found} "
            "(number of samples, checksum). Score this data, or train on the other."
        )


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
        raise ValueError(f"keep={keep}, skip={skip}, balance={balance}: give shares that leave enough to keep.")
    if mode not in ("hard", "easy", "random"):
        raise ValueError(f"mode={mode!r} is none of: hard, easy, random.")
    if balance and classes is None:
        raise ValueError(f"balance={balance} needs the classes of the samples.")
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


def _checksum(sample: Any) -> int:
    if isinstance(sample, Tensor):
        sample = (
            sample.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if sample.ndim else sample.item()
        )
    elif isinstance(sample, np.ndarray):
        sample = sample.tobytes()
    elif isinstance(sample, dict):
        sample = [(key, _checksum(part)) for key, part in sample.items()]
    elif isinstance(sample, (list, tuple)):
        sample = [_checksum(part) for part in sample]
    return zlib.crc32(sample if isinstance(sample, bytes) else repr(sample).encode())
