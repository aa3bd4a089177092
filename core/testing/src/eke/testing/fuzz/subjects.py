"""The model and the data of a case."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from eke import measure
from eke.testing import models
from eke.testing.data import Loader
from eke.testing.fuzz.case import Case
from eke.testing.zoo import ZOO
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import lr_scheduler
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler, WeightedRandomSampler

SHAPES = {shape.__name__: shape for shape in models.SHAPES}
LAYERS = 4  # that can be halved
RATE = {"adamw": 1e-2, "adam": 1e-2, "sgd": 0.05}


@cache
def fast_bf16() -> bool:
    """Whether this processor multiplies in bfloat16 at a fair speed. One without instructions takes minutes a case."""
    return measure.speed(torch.bfloat16) > measure.speed(torch.float32) / 4


def make_model(case: Case, seed: int, steps: int = 0) -> LightningModule:
    """The model of a case, with the case's optimizer, schedule and data.

    Args:
        case: What is drawn.
        seed: Of its first weights; a run that resumes has others.
    """
    if case.model in SHAPES:
        model = SHAPES[case.model](dropout=case["dropout"], seed=seed, layers=LAYERS)
    else:
        model = ZOO[case.model].build(seed)
    # The class and not the object, as a user would write it: Lightning looks there for what is overridden.
    base = type(model)
    model.__class__ = type(base.__name__, (Fuzzed, base), {"__module__": base.__module__})
    model.case = case
    return model


@cache
def import_for(name: str) -> None:
    """Import what a model needs, here and once: processes that are forked from this one have it then."""
    make_model(Case(model=name), 0)


def model_names() -> list[str]:
    """The kit's shapes, and those of the zoo that can be built here."""
    return [*SHAPES, *(name for name, animal in ZOO.items() if not animal.missing)]


def like(name: str) -> str:
    """The shape of the kit's that an animal of the zoo is like: who says by ``MODELS`` that it trains the one is tried
    on the other too."""
    return name if name in SHAPES else "TinyViT" if "images" in ZOO[name].tags else "TinyGPT2"


class Fuzzed:
    """Goes before a LightningModule's class: optimizer, schedule and data of a case."""

    case: Case

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        returned = super().training_step(batch, batch_idx)
        loss = returned["loss"] if isinstance(returned, dict) else returned
        if loss is not None:
            sync = self.case["processes"] > 1
            self.log("step_loss", loss.detach(), on_step=True, on_epoch=False, sync_dist=sync, batch_size=1)
            self.log("epoch_loss", loss.detach(), on_step=False, on_epoch=True, sync_dist=sync, batch_size=1)
        return returned

    def configure_optimizers(self) -> Any:
        if not self.automatic_optimization:
            return super().configure_optimizers()  # its step expects those
        case, rate = self.case, RATE[self.case["optimizer"]]
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        groups = [
            {"params": weights[part :: case["groups"]], "lr": rate / (1 + part), "weight_decay": 0.1 / (1 + part)}
            for part in range(case["groups"])
        ]
        groups = [group for group in groups if group["params"]]
        if case["optimizer"] == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9)
        else:
            kind = torch.optim.AdamW if case["optimizer"] == "adamw" else torch.optim.Adam
            optimizer = kind(groups, lr=rate, eps=1e-4)
        if case["schedule"] == "none":
            return optimizer
        config = {"scheduler": self.schedule(optimizer), "interval": case["interval"], "frequency": case["frequency"]}
        if case["schedule"] == "plateau":
            validated = bool(case["validate"]) and case["val_check"] == 1.0 and case["val_epochs"] == 1
            by_epoch = "val_loss" if validated else "epoch_loss"
            config["monitor"] = "step_loss" if case["interval"] == "step" else by_epoch
        return {"optimizer": optimizer, "lr_scheduler": config}

    def schedule(self, optimizer: torch.optim.Optimizer) -> Any:
        kind = self.case["schedule"]
        if kind == "warmup":
            return lr_scheduler.LambdaLR(optimizer, models.warm_up_then_decay)
        if kind == "onecycle":
            known = self.trainer.estimated_stepping_batches
            total = int(known) if 0 < known < float("inf") else 50
            return lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=total + 2)
        if kind == "cosine":
            return lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
        if kind == "exponential":
            return lr_scheduler.ExponentialLR(optimizer, 0.8)
        # So strict a threshold that it lowers the rate every few looks.
        return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.7, patience=0, threshold=0.1)

    def train_dataloader(self) -> Any:
        return make_loader(self.case)

    def val_dataloader(self) -> Any:
        return DataLoader(samples_of(self.case, 2 * self.case["batch"]), self.case["batch"], **_collating(self.case))


def samples_of(case: Case, size: int) -> Any:
    """So many samples of the model's data."""
    return SHAPES[case.model].dataset(size) if case.model in SHAPES else ZOO[case.model].dataset(0, size)


def _collating(case: Case) -> dict[str, Any]:
    return {} if case.model in SHAPES else {"collate_fn": ZOO[case.model].collate}


def make_loader(case: Case) -> Any:
    """The train loader of a case."""
    size = case["batches"] * case["batch"] * case["processes"] - (1 if case["ragged"] and case["batch"] > 1 else 0)
    data = samples_of(case, size)
    if case["augment"]:
        data = Augmented(data)
    more: dict[str, Any] = {"num_workers": case["workers"], **_collating(case)}
    if case["workers"]:
        more |= {"persistent_workers": case["persistent"]}
    name, batch = case["loader"], case["batch"]
    if name == "shuffle":
        return DataLoader(data, batch, shuffle=True, **more)
    if name == "generator":
        return DataLoader(data, batch, shuffle=True, generator=torch.Generator().manual_seed(5), **more)
    if name == "weighted":
        return DataLoader(data, batch, sampler=WeightedRandomSampler([1.0 + i % 3 for i in range(size)], size), **more)
    if name == "replacement":
        return DataLoader(data, batch, sampler=RandomSampler(data, replacement=True, num_samples=size), **more)
    if name == "own batches":
        return DataLoader(data, batch_sampler=OwnBatches(size, batch), **more)
    if name == "stateful":
        loader = Loader(data, batch, case["workers"])
        loader.collate_fn = more.get("collate_fn", loader.collate_fn)
        return loader
    if name in ("iterable", "endless"):
        return DataLoader((Stream if name == "iterable" else Endless)(data), batch, **more)
    return DataLoader(data, batch, **more)


class Augmented(Dataset):
    """Samples changed by the global random state, as augmentations do."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        turn = int(torch.randint(3, ()))

        def change(value: Tensor) -> Tensor:
            if value.ndim == 0:
                return value  # a class
            return value + 0.1 * torch.randn_like(value) if value.is_floating_point() else value.roll(turn, 0)

        return tree_map(change, self.data[index])


class OwnBatches(Sampler):
    """A batch sampler of a user's own, in the order of the global random state."""

    def __init__(self, size: int, batch: int) -> None:
        self.size, self.batch = size, batch

    def __len__(self) -> int:
        return -(-self.size // self.batch)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.size).tolist()
        for start in range(0, self.size, self.batch):
            yield order[start : start + self.batch]


class Endless(IterableDataset):
    """A stream of the samples; its length is not known."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for index in range(first, len(self.data), step):
            yield self.data[index]


class Stream(Endless):
    """The same with a length."""

    def __len__(self) -> int:
        return len(self.data)
