"""What is trained: a model, its data and how both are judged, at several sizes, without a download."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from eke import ArgumentError
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


@dataclass(frozen=True)
class Size:
    """How large a workload is.

    Args:
        steps: Of the full budget. The baseline is trained for a half and a third of it, too.
        batch: Samples in a step.
        shape: Arguments of the reference model: the best plain one that a sweep found for the full budget.
        smaller: Shape of the control, a plain model that costs less a step.
        lrs: Learning rates of the sweep, rising. It goes on beyond either end while that is the best.
        deep: Shape of a model whose depth is given, for what needs blocks to work on; its control has half of them.
        seeds: Runs of each kind.
        evaluations: Per run, at equal distances, the last after the last step.
        options: What else the workload needs to know, such as the length of a text window.
    """

    steps: int
    batch: int
    shape: Mapping[str, int]
    smaller: Mapping[str, int]
    lrs: tuple[float, ...]
    deep: Mapping[str, int] | None = None
    seeds: int = 3
    evaluations: int = 6
    options: Mapping[str, Any] = field(default_factory=dict)


def shape(blocks: int, width: int, **more: int) -> dict[str, int]:
    """Of a model, on one line of a table of sizes."""
    return {"blocks": blocks, "width": width, **more}


class Workload:
    """Base class; give an own one to ``eke bench --workload package.module:Class``.

    Attributes:
        name: Short, for file names.
        metric: Which logged value decides; ``"val_loss"`` or ``"val_accuracy"``.
        unit: Of the metric, for people.
        higher_is_better: For the metric.
        val_batch: Samples in a batch of held-out data.
        sizes: ``"smoke"`` takes seconds, ``"cpu"`` about a minute a run on one thread, ``"gpu"`` minutes on one GPU.
    """

    name: ClassVar[str]
    metric: ClassVar[str] = "val_loss"
    unit: ClassVar[str] = "nats"
    higher_is_better: ClassVar[bool] = False
    val_batch: ClassVar[int] = 32
    sizes: ClassVar[dict[str, Size]]

    def __init__(self, size: str) -> None:
        if size not in self.sizes:
            raise ArgumentError(f"{self.name} has no size {size!r}. It has: {', '.join(self.sizes)}.")
        self.size = self.sizes[size]

    def model(self, shape: Mapping[str, int], lr: float, steps: int) -> Learner:
        """A new model. Its initial weights follow from torch's random state alone."""
        raise NotImplementedError

    def data(self) -> tuple[Dataset, Dataset]:
        """Samples to train on, and held-out ones, the same for every run."""
        raise NotImplementedError

    def train_loader(self, seed: int) -> DataLoader:
        """Training data in an order that follows from ``seed`` alone, whatever random numbers others draw."""
        order = torch.Generator().manual_seed(seed)
        return DataLoader(self.data()[0], self.size.batch, shuffle=True, drop_last=True, generator=order)

    def val_loader(self) -> DataLoader:
        return DataLoader(self.data()[1], self.val_batch)

    def finish(self, model: LightningModule) -> dict[str, float]:
        """Further measures of a trained model, such as a linear probe. Not charged."""
        return {}

    def tokens(self) -> int:
        """Tokens (or patches) that a plain step sees."""
        raise NotImplementedError


class Learner(LightningModule):
    """What the workloads' models share: AdamW with a learning rate that is zero after the last of ``steps``.

    Subclasses give :meth:`loss`. A plain loop needs only that and :meth:`configure_optimizers`.
    """

    warmup = 0.05  # of the steps

    def __init__(self, lr: float, steps: int) -> None:
        super().__init__()
        self.lr, self.steps = lr, steps

    def loss(self, batch: Any) -> Tensor:
        raise NotImplementedError

    def measures(self, batch: Any) -> dict[str, Tensor]:
        """What validation logs, averaged over samples."""
        return {"val_loss": self.loss(batch)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log_dict(self.measures(batch), batch_size=_samples(batch))

    def configure_optimizers(self) -> dict[str, Any]:
        trained = [weight for weight in self.parameters() if weight.requires_grad]
        groups = [
            {"params": [weight for weight in trained if weight.ndim >= 2], "weight_decay": 0.1},
            {"params": [weight for weight in trained if weight.ndim < 2], "weight_decay": 0.0},
        ]
        # fused: on a CPU torch otherwise picks a Python loop that takes five times as long.
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.95), fused=True)
        rise = max(1, round(self.warmup * self.steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, self.steps, rise))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def lr_factor(step: int, steps: int, rise: int) -> float:
    """Share of the highest learning rate at ``step``: up over ``rise`` steps, then straight down to 0 at ``steps``."""
    return min((step + 1) / rise, max(0.0, (steps - step) / max(1, steps - rise)), 1.0)


def endless(loader: DataLoader) -> Iterator[Any]:
    """Batches of one epoch after the other."""
    while True:
        yield from loader


def initialize(module: nn.Module) -> None:
    """The start of GPT-2: normal with 0.02, no bias. For ``module.apply``."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _samples(batch: Any) -> int:
    while not isinstance(batch, Tensor):
        batch = next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0]
    return len(batch)
