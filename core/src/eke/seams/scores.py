"""Scores of samples as a file that says which data it is of, and how to come by them with a trained model.

The tricks it hides: a file that is cut short or of other data must not choose samples; no reader meets half a file;
and a model scores samples without logging, dropout or a trace in its gradients.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from eke.seams.batch import named_parts, rows, size
from eke.seams.scoring import check_scorable, error_norms, evaluating, scoring_pass
from eke.seams.step import muted, notes_kept, step_arguments
from eke.spec import ArgumentError, EkeError

Collate = Callable[[list[Any]], Any]
_FORMAT = 1


class ScoresError(EkeError, ValueError):
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
        whole = isinstance(about, dict) and {"kind", "runs", "data"} <= about.keys()
        if not whole or about.get("format") != _FORMAT or zlib.crc32(values.tobytes()) != checksum:
            raise ScoresError(f"{file} is damaged, or of another version: its checksum does not agree.")
        count = str(about["data"]).partition("-")[0]
        if values.ndim != 1 or values.dtype.kind != "f" or (count.isdigit() and len(values) != int(count)):
            raise ScoresError(
                f"{file} holds {values.dtype} values of shape {values.shape}, and says that its data has {count} "
                "samples: one number for each is needed. Score the data anew."
            )
        if bool(np.isnan(values).any()):
            raise ScoresError(f"{file} holds {int(np.isnan(values).sum())} scores that are NaN. Score the data anew.")
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


def score(
    pl_module: LightningModule,
    dataset: Any,
    kind: Literal["loss", "el2n", "grand"] = "loss",
    *,
    batch_size: int = 256,
    collate_fn: Collate | None = None,
    device: str | torch.device | None = None,
) -> Scores:
    """Score every sample of a dataset by a model that is trained already, in evaluation mode.

    The mean over several models: ``first.merged(second)``.

    Args:
        pl_module: Its ``training_step`` gives the losses. It is left as it was, but for its device.
        dataset: Map-style.
        kind: ``"loss"``; ``"el2n"``, the length of the loss's gradient by the logits; ``"grand"``, its length by all
            weights that are trained, which takes a forward and a backward pass for every single sample.
        batch_size: Samples at once.
        collate_fn: As the ``DataLoader`` has it.
        device: By default the one that the model is on.

    Raises:
        ValueError: another kind; losses that cannot be followed back to the samples; a module that optimizes by hand.
    """
    if kind not in ("loss", "el2n", "grand"):
        raise ArgumentError(f"kind={kind!r} is none of: loss, el2n, grand.")
    check_scorable(pl_module)
    device = torch.device(device) if device is not None else pl_module.device
    pl_module.to(device)
    found: list[Tensor] = []
    for batch_idx, batch in enumerate(DataLoader(dataset, batch_size, collate_fn=collate_fn)):
        batch = move_data_to_device(batch, device)
        batch, *arguments = step_arguments(pl_module, batch, batch_idx)
        if kind == "grand":
            found += _lengths(pl_module, batch, *arguments)
        else:
            captured = scoring_pass(pl_module, pl_module.training_step, batch, *arguments)
            found.append(captured.losses if kind == "loss" else error_norms(captured))
    return Scores(kind, torch.cat(found).double().cpu(), 1, fingerprint(dataset))


def cross_scores(
    train: Callable[[Subset], LightningModule],
    dataset: Any,
    kind: Literal["loss", "el2n", "grand"] = "loss",
    *,
    seed: int = 0,
    **options: Any,
) -> Scores:
    """Score every sample by a model that has not been trained on it: two models, each trained on one half of the data.

    A wrong label has a high loss here; after training on it, it would not. Needs no holdout.

    Args:
        train: A dataset to a trained model; called twice.
        dataset: Map-style.
        kind: As for :func:`score`.
        seed: Of the halves.
        options: ``batch_size``, ``collate_fn`` and ``device`` of :func:`score`.

    Source:
        Mindermann and others, ICML 2022, https://arxiv.org/abs/2206.07137, section 4.2.
    """
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    halves = order[: len(order) // 2].sort().values, order[len(order) // 2 :].sort().values
    values = torch.zeros(len(dataset), dtype=torch.float64)
    for own, other in (halves, halves[::-1]):
        model = train(Subset(dataset, own.tolist()))
        values[other] = score(model, Subset(dataset, other.tolist()), kind, **options).values
    return Scores.of(dataset, kind, values)


def _lengths(pl_module: LightningModule, batch: Any, *arguments: Any) -> Iterator[Tensor]:
    """Of the gradient of each sample's loss by all trained weights, each (1,)."""
    weights = [weight for weight in pl_module.parameters() if weight.requires_grad]
    with muted(pl_module), notes_kept(pl_module), evaluating(pl_module):
        for number in range(size(batch)):
            with torch.enable_grad():
                output = pl_module.training_step(rows(batch, torch.tensor([number])), *arguments)
                loss = output if isinstance(output, Tensor) else output["loss"]
                gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            squares = [gradient.float().square().sum() for gradient in gradients if gradient is not None]
            yield torch.stack(squares).sum().sqrt().reshape(1).cpu()


def _checksum(sample: Any) -> int:
    if isinstance(sample, Tensor):
        sample = (
            sample.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if sample.ndim else sample.item()
        )
    elif isinstance(sample, np.ndarray):
        sample = sample.tobytes()
    elif (parts := named_parts(sample)) is not None:
        sample = [(key, _checksum(part)) for key, part in parts.items()]
    elif isinstance(sample, (list, tuple)):
        sample = [_checksum(part) for part in sample]
    return zlib.crc32(sample if isinstance(sample, bytes) else repr(sample).encode())
