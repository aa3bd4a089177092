"""Scores of a dataset by a trained model, without a run: loss, EL2N, and GraNd.

Source: Paul, Ganguli, Dziugaite, "Deep Learning on a Data Diet: Finding Important Examples Early in Training", NeurIPS
2021, https://arxiv.org/abs/2107.07075, definitions 2.1 (GraNd) and 2.2 (EL2N).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any, Literal

import torch
from eke.seams.batch import rows, size
from eke.seams.presample import error_norms, evaluating, overheard
from eke.seams.step import muted
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from eke_data_scores.scores import Scores, fingerprint

Collate = Callable[[list[Any]], Any]


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
        ValueError: another kind; losses that cannot be followed back to the samples.
    """
    if kind not in ("loss", "el2n", "grand"):
        raise ValueError(f"kind={kind!r} is none of: loss, el2n, grand.")
    device = torch.device(device) if device is not None else pl_module.device
    pl_module.to(device)
    found: list[Tensor] = []
    for batch_idx, batch in enumerate(DataLoader(dataset, batch_size, collate_fn=collate_fn)):
        batch = move_data_to_device(batch, device)
        arguments = (batch_idx,) if "batch_idx" in signature(pl_module.training_step).parameters else ()
        if kind == "grand":
            found += _lengths(pl_module, batch, *arguments)
        else:
            heard = overheard(pl_module, pl_module.training_step, batch, *arguments)
            found.append(heard.losses if kind == "loss" else error_norms(heard))
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
    with muted(pl_module), evaluating(pl_module):
        for number in range(size(batch)):
            with torch.enable_grad():
                output = pl_module.training_step(rows(batch, torch.tensor([number])), *arguments)
                loss = output if isinstance(output, Tensor) else output["loss"]
                gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            squares = [gradient.float().square().sum() for gradient in gradients if gradient is not None]
            yield torch.stack(squares).sum().sqrt().reshape(1).cpu()


def embed(
    function: Callable[[Any], Tensor], dataset: Any, *, batch_size: int = 256, collate_fn: Collate | None = None
) -> Tensor:
    """Embeddings of all samples, (samples, width), float32, on the CPU.

    Args:
        function: A batch, as the collate function makes it, to (batch, width).
        dataset: Map-style.
        batch_size: Samples at once.
        collate_fn: As the ``DataLoader`` has it.

    Raises:
        ValueError: another shape.
    """
    found = []
    with torch.no_grad():
        for batch in DataLoader(dataset, batch_size, collate_fn=collate_fn):
            one = function(batch)
            if one.ndim != 2 or len(one) != size(batch):
                raise ValueError(
                    f"The embedding of a batch of {size(batch)} samples has shape {tuple(one.shape)}. Give (batch, "
                    "width): the class token, say, or the mean over tokens."
                )
            found.append(one.float().cpu())
    return torch.cat(found)
