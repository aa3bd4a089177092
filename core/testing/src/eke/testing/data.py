"""Tiny data that is the same in every process, and a loader that knows its position within an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

BATCH = 4
LENGTH = 8
VOCABULARY = 32
CLASSES = 4
PIXELS = 8


class Tokens(Dataset):
    """Token sequences and the sequences shifted by one. Sample ``index`` depends on ``index`` alone."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        # A run of consecutive tokens: something that a model of width 16 can learn.
        run = (torch.arange(LENGTH + 1) * (1 + index % 3) + index) % VOCABULARY
        return run[:-1], run[1:]


class Images(Dataset):
    """Images (3, 8, 8) and their class. Sample ``index`` depends on ``index`` alone."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        label = index % CLASSES
        image = torch.randn(3, PIXELS, PIXELS, generator=generator) + label
        return image, torch.tensor(label)


class Order(Sampler):
    """A new order each epoch, the same in every process; rank ``rank`` of ``world`` takes every ``world``-th sample.

    So the batches of all ranks together are one process's batch of ``world`` times the size.
    """

    def __init__(self, size: int, rank: int = 0, world: int = 1) -> None:
        self.size, self.rank, self.world = size, rank, world
        self.epoch = 0
        self.skip = 0

    def __len__(self) -> int:
        return self.size // self.world

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        mine = order[self.rank :: self.world]
        skip, self.skip = self.skip, 0
        return iter(mine[skip:])


class Loader(DataLoader):
    """A DataLoader that a run can leave and take up again at the same batch, with workers too.

    Lightning saves and restores what a loader offers as ``state_dict``. Three things differ from the stock
    loader, each a known gap in resuming: the position is counted in batches handed out, not fetched ahead; the
    workers start at the first batch, when the epoch is known; and no draw comes from the global random state.
    """

    def __init__(self, dataset: Dataset, batch_size: int = BATCH, workers: int = 0, rank: int = 0, world: int = 1):
        super().__init__(
            dataset,
            batch_size=batch_size,
            sampler=Order(len(dataset), rank, world),
            num_workers=workers,
            generator=torch.Generator().manual_seed(0),
        )
        self.position = 0
        self._start = 0

    def __iter__(self) -> Iterator[Any]:
        self.position, self._start = self._start, 0
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        sampler = self.batch_sampler.sampler
        if isinstance(sampler, Order):  # a technique that puts its own sampler here skips for itself
            sampler.skip = self.position * self.batch_size
        for batch in super().__iter__():
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._start = state["position"] % len(self)


def shuffled(dataset: Dataset, batch_size: int = BATCH, workers: int = 0, rank: int = 0, world: int = 1) -> DataLoader:
    """A stock DataLoader that shuffles by the global random state: what most people train with.

    Lightning alone starts its epoch again when a run resumes in mid-epoch; Eke's core does not.
    """
    if world > 1:
        return DataLoader(dataset, batch_size, sampler=Order(len(dataset), rank, world), num_workers=workers)
    return DataLoader(dataset, batch_size, shuffle=True, num_workers=workers)
