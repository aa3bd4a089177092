"""The batch of a dry run: of other sizes than the user's, and as often as asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from eke.forecast.errors import ForecastError
from eke.quiet import quiet
from lightning.pytorch import LightningModule
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, Dataset


def first_size(build: Callable[[], tuple[LightningModule, Any]]) -> int:
    """How many samples the batch has that ``build`` gives."""
    with FakeTensorMode(allow_non_fake_inputs=True), quiet(all_warnings=True):
        tensors = [leaf for leaf in tree_leaves(first(build()[1])) if isinstance(leaf, Tensor) and leaf.ndim]
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
        return DataLoader(_Samples(batch, count * samples), samples)
    return _Batches(batch, count)


class _Samples(Dataset):
    """The first sample of a batch, a number of times."""

    def __init__(self, batch: Any, count: int) -> None:
        self.batch, self.count = batch, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return tree_map(lambda leaf: leaf[0], self.batch)


class _Batches:
    """The same batch, a number of times. A list would be taken for several loaders."""

    def __init__(self, batch: Any, count: int) -> None:
        self.batch, self.count = batch, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        return iter([self.batch] * self.count)


def first(given: Any) -> Any:
    if isinstance(given, (Tensor, dict, tuple)) or (isinstance(given, list) and given and isinstance(given[0], Tensor)):
        return given
    return next(iter(given))
