"""The batch of a dry run: of other sizes than the user's, and as often as asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

from eke import compat
from eke.forecast.errors import ForecastError
from eke.quiet import quiet
from lightning.pytorch import LightningModule
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, Dataset

MANY = 1024  # samples that are not put together one by one


def built(build: Callable[[], Any]) -> tuple[LightningModule, Any]:
    """The model and the batch that ``build`` returns.

    Raises:
        ForecastError: it returned something else.
    """
    given = build()
    parts = given if isinstance(given, tuple) else (given,)
    if len(parts) != 2 or not isinstance(getattr(parts[0], "_orig_mod", parts[0]), LightningModule):
        names = ", ".join(type(part).__name__ for part in parts)
        found = f"({names})" if len(parts) > 1 else f"a {names}"
        raise ForecastError(
            f"{getattr(build, '__name__', 'build')}() returned {found}. A forecast needs two things, "
            "(model, batch): a LightningModule, and a batch or a DataLoader that gives one."
        )
    return parts[0], parts[1]


def first_size(build: Callable[[], tuple[LightningModule, Any]]) -> int:
    """How many samples the batch has that ``build`` gives."""
    with FakeTensorMode(allow_non_fake_inputs=True), quiet(all_warnings=True):
        tensors = [leaf for leaf in tree_leaves(first(built(build)[1])) if isinstance(leaf, Tensor) and leaf.ndim]
    return len(tensors[0]) if tensors else 1


def resized(batch: Any, batch_size: int | None, length: int | None) -> Any:
    """A batch with another number of samples, or of tokens in a sample.

    Raises:
        ForecastError: it holds no tensor, or none of integers whose second dimension would be the tokens.
    """
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
    if not tensors:
        raise ForecastError(f"the batch is a {type(batch).__name__} without tensors, which has no size to change.")
    samples = len(tensors[0])
    tokens = next((t.shape[1] for t in tensors if t.ndim > 1 and not t.is_floating_point()), None)
    if length is not None and tokens is None:
        raise ForecastError("length= needs a tensor of integers, tokens, of two dimensions, and the batch holds none.")

    def change(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.ndim or len(leaf) != samples:
            return leaf
        shape = list(leaf.shape)
        shape[0] = batch_size or samples
        if length is not None and leaf.ndim > 1 and shape[1] == tokens:
            shape[1] = length
        return leaf if shape == list(leaf.shape) else leaf.new_zeros(shape)

    return tree_map(change, batch)


def batches(batch: Any, count: int) -> Iterable[Any]:
    """The same batch, a number of times: in a ``DataLoader`` where it can be put together again from samples."""
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    plain = type(batch) in (tuple, list, dict, Tensor, FakeTensor) and len(tensors) == len(tree_leaves(batch))
    if plain and tensors and all(leaf.ndim and len(leaf) == len(tensors[0]) for leaf in tensors):
        samples = len(tensors[0])
        if samples <= MANY:
            return DataLoader(_Samples(batch, count * samples), samples)
        numbers = _Numbers(batch, count * samples)
        return DataLoader(numbers, samples, collate_fn=numbers.collate)
    return _Batches(batch, count)


class _Samples(Dataset):
    """The first sample of a batch, a number of times."""

    def __init__(self, batch: Any, count: int) -> None:
        self.batch, self.count = batch, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return tree_map(lambda leaf: leaf[0], self.batch)


class _Numbers(_Samples):
    """The same, all samples of a batch at once: one by one, the largest that fits a GPU would take minutes."""

    def __getitem__(self, index: int) -> int:
        return index

    def collate(self, samples: list[int]) -> Any:
        return tree_map(lambda leaf: leaf[:1].repeat(len(samples), *[1] * (leaf.ndim - 1)), self.batch)


class _Batches:
    """The same batch, a number of times. A list would be taken for several loaders."""

    def __init__(self, batch: Any, count: int) -> None:
        self.batch, self.count = batch, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        return iter([self.batch] * self.count)


def first(given: Any) -> Any:
    """The batch itself, or the first that a loader gives.

    Raises:
        ForecastError: neither a batch nor something that gives one.
    """
    if isinstance(given, (Tensor, Mapping, tuple)) or is_dataclass(given):
        return given
    if isinstance(given, list) and given and isinstance(given[0], Tensor):
        return given
    if not isinstance(given, Iterable):
        raise ForecastError(
            f"the batch is of type {type(given).__name__}. Return a batch of tensors from build, or a DataLoader."
        )
    if isinstance(given, DataLoader) and given.num_workers:
        given = copy.copy(given)  # fake tensors do not travel between processes
        vars(given).update(num_workers=0, persistent_workers=False, prefetch_factor=None, timeout=0)
    with compat.unset_fake_temporarily():  # a loader reads the numbers that it draws; samples made before stay fake
        batch = next(iter(given), None)
    if batch is None:
        raise ForecastError(f"the {type(given).__name__} gives no batch. A forecast needs one.")
    return batch
