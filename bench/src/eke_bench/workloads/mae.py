"""Masked autoencoding of handwritten digits, judged by a linear probe.

He, Chen, Xie, Li, Dollar, Girshick, "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022: the encoder sees the
patches that are not masked, a light decoder predicts the normalized pixels of those that are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from eke_bench.workloads.base import Learner, Size, Workload, initialize, shape
from eke_bench.workloads.blocks import Block
from eke_bench.workloads.vit import CLASSES, HEAD_WIDTH, SIDE, digits, patches

RIDGE = 1.0


class MAE(Learner):
    """Encoder on the visible patches, decoder of one block at half of the width on all.

    Which patches are masked is drawn for each sample from torch's random state.

    Args:
        blocks: Of the encoder.
        width: Of the encoder, a multiple of 64.
        keep: Visible patches, in hundredths.
        patch: Side of a patch in pixels.
    """

    draws_random_numbers = True

    def __init__(self, blocks: int, width: int, keep: int, patch: int, lr: float, steps: int) -> None:
        super().__init__(lr, steps)
        self.patch, count = patch, (SIDE // patch) ** 2
        self.visible = max(1, round(count * keep / 100))
        self.embed = nn.Linear(patch * patch, width)
        self.position = nn.Parameter(torch.zeros(1, count, width))
        self.blocks = nn.ModuleList(Block(width, width // HEAD_WIDTH) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.narrow, self.mask = nn.Linear(width, width // 2), nn.Parameter(torch.zeros(1, 1, width // 2))
        self.place = nn.Parameter(torch.zeros(1, count, width // 2))
        self.decoder = Block(width // 2, width // 2 // HEAD_WIDTH)
        self.out = nn.Sequential(nn.LayerNorm(width // 2), nn.Linear(width // 2, patch * patch))
        self.apply(initialize)
        for weight in (self.position, self.place, self.mask):
            nn.init.normal_(weight, std=0.02)

    def encode(self, x: Tensor, order: Tensor | None = None) -> Tensor:
        """Patches (batch, patches, pixels) to features of the first ``visible`` of ``order``, or of all of them."""
        x = self.embed(x) + self.position
        if order is not None:
            x = x.gather(1, order[:, : self.visible, None].expand(-1, -1, x.shape[-1]))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, x: Tensor, order: Tensor) -> Tensor:
        """Prediction of every patch, (batch, patches, pixels), from the visible ones."""
        seen = self.narrow(self.encode(x, order))
        full = torch.cat([seen, self.mask.expand(len(x), order.shape[1] - self.visible, -1)], dim=1)
        back = order.argsort(1)[:, :, None].expand(-1, -1, full.shape[-1])
        return self.out(self.decoder(full.gather(1, back) + self.place))

    def loss(self, batch: Any, draws: torch.Generator | None = None) -> Tensor:
        x = patches(batch[0], self.patch)
        order = torch.rand(x.shape[:2], device=x.device, generator=draws).argsort(1)
        return masked_loss(self(x, order), x, order[:, self.visible :])

    def measures(self, batch: Any) -> dict[str, Tensor]:
        # The same masks at every evaluation, and none of the run's random numbers.
        return {"val_loss": self.loss(batch, torch.Generator(batch[0].device).manual_seed(0))}


def masked_loss(predicted: Tensor, x: Tensor, masked: Tensor) -> Tensor:
    """Mean squared error on the masked patches, each patch's pixels normalized to mean 0 and variance 1.

    Args:
        predicted: (batch, patches, pixels).
        x: Pixels, of the same shape.
        masked: Positions that count, (batch, k), int64. With none of them, all count.
    """
    target = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt()
    error = (predicted.float() - target).square().mean(-1)
    return (error.gather(1, masked) if masked.shape[1] else error).mean()


class Masked(Workload):
    """Masked autoencoding of 5,000 handwritten digits, judged by a linear probe."""

    name = "mae"
    metric = "probe_accuracy"
    unit = "probe accuracy"
    higher_is_better = True
    val_batch = 250
    sizes: ClassVar[dict[str, Size]] = {
        "smoke": Size(
            steps=24, batch=16, shape=shape(1, 64, keep=50), smaller=shape(1, 64, keep=25), lrs=(1e-3, 2e-3, 4e-3),
            seeds=2, evaluations=2, options={"patch": 14},
        ),
        "cpu": Size(
            steps=1200, batch=50, shape=shape(3, 64, keep=25), smaller=shape(1, 64, keep=25), lrs=(5e-4, 1e-3, 2e-3),
            options={"patch": 4},
        ),
        "gpu": Size(
            steps=7998, batch=250, shape=shape(8, 256, keep=25), smaller=shape(4, 256, keep=25), lrs=(5e-4, 1e-3, 2e-3),
            options={"patch": 4},
        ),
    }  # fmt: skip

    def model(self, shape: Mapping[str, int], lr: float, steps: int) -> MAE:
        return MAE(**shape, patch=self.size.options["patch"], lr=lr, steps=steps)

    def data(self) -> tuple[Dataset, Dataset]:
        images, classes, held_out, held_classes = digits()
        return TensorDataset(images, classes), TensorDataset(held_out, held_classes)

    @torch.no_grad()
    def finish(self, model: LightningModule) -> dict[str, float]:
        model.eval()
        train, train_classes, held_out, classes = digits()
        features = [
            torch.cat(
                [
                    model.encode(patches(part.to(model.position.device), model.patch)).mean(1).float().cpu()
                    for part in images.split(500)
                ]
            )
            for images in (train, held_out)
        ]
        return {"probe_accuracy": probe(features[0], train_classes, features[1], classes)}

    def tokens(self) -> int:
        return self.size.batch * (SIDE // self.size.options["patch"]) ** 2


def probe(train: Tensor, train_classes: Tensor, held_out: Tensor, classes: Tensor) -> float:
    """Accuracy of ridge regression on features, (samples, width), that are standardized on the training ones."""
    mean, spread = train.mean(0), train.std(0) + 1e-6
    x, y = (torch.cat([(part - mean) / spread, torch.ones(len(part), 1)], 1).double() for part in (train, held_out))
    targets = nn.functional.one_hot(train_classes, CLASSES).double()
    weights = torch.linalg.solve(x.T @ x + RIDGE * torch.eye(x.shape[1], dtype=x.dtype), x.T @ targets)
    return float(((y @ weights).argmax(1) == classes).double().mean())
