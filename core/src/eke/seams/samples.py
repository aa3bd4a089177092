"""Which samples an epoch sees, and which of them the batch at hand holds.

The tricks it hides: the length of an epoch is asked for before the epoch begins, and before a resumed run has its first
hook; a resume in mid-epoch has to find the samples with which the epoch began; and a learning rate that goes by steps
would stop early when epochs shrink.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler

from eke import compat
from eke.seams.data import IndexTap
from eke.seams.state import gather
from eke.spec import EkeError

if TYPE_CHECKING:
    from eke.run import Run


class SamplesError(EkeError, ValueError):
    """The samples of a loader cannot be chosen or told apart."""


class Samples:
    """The samples of a run's one train loader. Call :meth:`attach` from ``alter_loader``.

    Attributes:
        count: Samples of the dataset.
        kept: Which of them the running epoch sees, bool; they come in the order of the loader's own sampler.
        order: In place of that, the samples of the running epoch one after another, int64; one may come several times.
    """

    def __init__(self) -> None:
        self.count = 0
        self.kept = torch.ones(0, dtype=torch.bool)
        self.order: Tensor | None = None
        self._tap: IndexTap | None = None
        self._run: Run | None = None
        self._loader: DataLoader | None = None
        self._loads = 0  # how often the run had asked for loaders when this one came
        self._begun = False  # until then, epochs have their full length: schedules are made by it

    def begin(self) -> None:
        """Let epochs have the length of what is kept. Call it from ``begin_samples`` and where an epoch begins."""
        self._begun = True
        compat.set_epoch_length(self._run.trainer, self.batches)

    @property
    def length(self) -> int:
        """Samples of the running epoch."""
        if not self._begun:
            return self.count
        return int(self.kept.sum()) if self.order is None else len(self.order)

    @property
    def batches(self) -> int:
        """Of the running epoch, in this process."""
        return len(self._loader)

    @property
    def full(self) -> int:
        """Batches of an epoch that leaves nothing out."""
        loader, own = self._loader, -(-self.count // self._loader.batch_sampler.sampler.world_size)
        return own // loader.batch_size if loader.drop_last else -(-own // loader.batch_size)

    def attach(self, run: Run, loader: Any) -> Any:
        """Let :attr:`kept` choose among the samples of ``loader`` until the run ends, and note which go in each batch.

        Raises:
            SamplesError: an iterable dataset, a sampler that is none of torch's plain ones, or several train loaders.
        """
        asked, self._loads = self._loads, run.position.loads
        if loader is self._loader:
            return loader
        if self._loader is not None:
            if asked == self._loads:
                raise SamplesError("There are several train loaders. Choosing samples needs one.")
            self._release()  # another has come in its place
        if not isinstance(loader, DataLoader):
            raise SamplesError(
                f"The train loader is a {type(loader).__name__}; samples are chosen through a DataLoader's sampler."
            )
        if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
            raise SamplesError(
                f"A {type(loader.dataset).__name__} gives its samples in an order of its own: they have no numbers by "
                "which to choose them. That needs a map-style dataset, with __getitem__ and __len__."
            )
        inner = getattr(loader.batch_sampler, "sampler", None)
        sharded = run.world_size > 1
        if inner is None or not hasattr(loader.batch_sampler, "batch_size"):
            raise SamplesError("The loader makes its batches by a sampler of its own: nothing can be left out.")
        count = len(loader.dataset)
        if not sharded and len(inner) != count:
            raise SamplesError(
                f"The loader's {type(inner).__name__} gives {len(inner)} samples of {count}: choosing needs a "
                "sampler that gives each once."
            )
        if self.count not in (0, count):
            raise SamplesError(f"The checkpoint is of a run on {self.count} samples, and the data has {count}.")
        if not self.count:
            self.count, self.kept = count, torch.ones(count, dtype=torch.bool)
        self._loader, self._run = loader, run
        shards = run.trainer.strategy.distributed_sampler_kwargs if sharded else {}
        # DataLoader forbids setting its samplers; the inner one may be set and needs no new loader.
        loader.batch_sampler.sampler = Chosen(inner, self, shards.get("rank", 0), shards.get("num_replicas", 1))
        self._tap = IndexTap(loader)
        run.at_end(self.detach)
        return loader

    def detach(self) -> None:
        """Give the loader its own sampler back."""
        self._release()
        self._run, self._begun = None, False

    def _release(self) -> None:
        if self._tap is not None:
            self._tap.remove()
            self._loader.batch_sampler.sampler = self._loader.batch_sampler.sampler.inner
        self._tap = self._loader = None

    def batch(self) -> Tensor:
        """Numbers of the samples in the batch at hand of this process, int64, (batch,). Call it in a training step."""
        return torch.tensor(self._tap.at(self._run.trainer.fit_loop.batch_idx), dtype=torch.int64)

    def __reduce__(self) -> tuple[type[Samples], tuple[()]]:
        return Samples, ()  # a copy of a technique meets its data anew

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "kept": self.kept, "order": self.order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.kept, self.order = state["count"], state["kept"], state.get("order")


class Chosen(Sampler[int]):
    """Those of another sampler's samples that an epoch keeps, distributed among processes afterwards.

    Samples are repeated from the front until they divide evenly, as torch's ``DistributedSampler`` does.
    """

    def __init__(self, inner: Sampler[int], samples: Samples, rank: int, world_size: int) -> None:
        self.inner, self.samples, self.rank, self.world_size = inner, samples, rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self.inner, "set_epoch"):
            self.inner.set_epoch(epoch)

    def __len__(self) -> int:
        return -(-self.samples.length // self.world_size)

    def __iter__(self) -> Iterator[int]:
        kept = self.samples.kept
        order = self.samples.order
        chosen = [index for index in self._order() if kept[index]] if order is None else order.tolist()
        missing = -len(chosen) % self.world_size
        return iter((chosen + chosen[:missing])[self.rank :: self.world_size])

    def _order(self) -> list[int]:
        """All samples, in the same order on all processes."""
        inner = self.inner
        if self.world_size == 1:
            return list(inner)
        around = getattr(
            getattr(inner, "dataset", None), "_sampler", None
        )  # Lightning's wrapper around a sampler of the user's own
        if around is not None:
            return list(around)
        if not getattr(inner, "shuffle", True):
            return list(range(self.samples.count))
        # As DistributedSampler draws it. A sampler that distributes by itself gives no order of all: it gets this one.
        generator = torch.Generator().manual_seed(getattr(inner, "seed", 0) + self.epoch)
        return torch.randperm(self.samples.count, generator=generator).tolist()


def joined(captured: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Samples and values of several batches, in one tensor each; empty ones before the first batch."""
    numbers, values = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0)]
    return torch.cat(numbers + [one for one, _ in captured]), torch.cat(values + [one for _, one in captured])


def finite(numbers: Tensor, values: Tensor, who: str) -> tuple[Tensor, Tensor]:
    """Samples and values without those that are NaN or infinite, of which is warned: nothing can be chosen by them.

    Args:
        numbers: Of samples, int64.
        values: What was seen of each.
        who: Name for the warning.
    """
    known = values.isfinite()
    if not bool(known.all()):
        rank_zero_warn(
            f"{who}: {int((~known).sum())} of the {len(values)} losses of this epoch were NaN or infinite. What was "
            "known of those samples before is kept. Is the learning rate too high?"
        )
    return numbers[known], values[known]


def all_ranks(trainer: Trainer, numbers: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Samples and their values of all processes, in rank order: int64 and float32, never in one tensor, in which large
    numbers would lose digits."""
    parts = gather(trainer, (numbers, values))
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def keep_pace(trainer: Trainer, samples: Samples, batch_idx: int) -> None:
    """Step the learning rates on to where they would be after as large a part of a full epoch.

    Call it after each batch. Schedules by epoch, and those that look at a metric, are left alone.
    """
    done = trainer.current_epoch * samples.full + round((batch_idx + 1) * samples.full / samples.batches)
    wanted = done // trainer.accumulate_grad_batches
    for config in trainer.lr_scheduler_configs:
        if config.interval == "step" and config.frequency == 1 and not config.reduce_on_plateau:
            while config.scheduler.last_epoch < wanted:
                config.scheduler.step()
