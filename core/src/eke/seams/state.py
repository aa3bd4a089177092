"""What Eke keeps in a checkpoint, under one key, and the random state.

The tricks it hides: ``Callback.on_save_checkpoint`` is not called for weights-only checkpoints, the
``LightningModule``'s is; callback state comes back after the weights are loaded, too late for a technique that has to
rebuild the module tree; the default load takes tensors and plain Python values only; and Lightning keeps no
random state at all, so that dropout alone makes a resumed run end elsewhere.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from eke import compat
from eke.spec import EkeError

KEY = "eke"
VERSION = 1


class StateError(EkeError, TypeError):
    """Something in a state that a checkpoint's safe load would refuse."""


def rng_state() -> dict[str, Any]:
    """Python's, NumPy's, torch's and CUDA's random state of this process, as tensors and plain values."""
    return plain_rng(rng_now())


def rng_now() -> tuple[Any, ...]:
    """The same as it comes, which costs little: for each batch."""
    import numpy

    cuda = torch.cuda.get_rng_state_all() if _has_cuda else []
    return random.getstate(), numpy.random.get_state(), torch.default_generator.get_state(), cuda


def plain_rng(now: tuple[Any, ...] | dict[str, Any]) -> dict[str, Any]:
    """What :func:`rng_now` gave, as :func:`rng_state` gives it."""
    if isinstance(now, dict):
        return now
    python, (name, keys, position, has_gauss, gauss), cpu, cuda = now
    return {
        "python": python,
        "numpy": (name, torch.from_numpy(keys.astype("int64")), int(position), int(has_gauss), float(gauss)),
        "torch": cpu,
        "cuda": cuda,
    }


_has_cuda = torch.cuda.is_available()


def seed_everything(seed: int) -> None:
    """Seed torch, random and numpy. Lightning's own function leaves the seed in the environment, by which each later
    run under DDP is seeded anew."""
    import numpy

    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what :func:`rng_state` gave."""
    import numpy

    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])


def gather(trainer: Trainer, own: Any) -> list[Any]:
    """One object from each process, in rank order, on every process. Every process has to call it."""
    if trainer.world_size == 1 or not torch.distributed.is_initialized():
        return [own]
    everyone: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(everyone, own)
    return everyone


def held_gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Gradients of an accumulation window that is not through yet, by parameter name; empty at a window's end.

    Lightning does not save them, and resumes in the middle of a window with half the gradient. Where the user optimizes
    by hand, only he knows when a window ends: all that are there are held.
    """
    module = trainer.strategy.lightning_module
    if module.automatic_optimization and compat.batches_done(trainer) % trainer.accumulate_grad_batches == 0:
        return {}
    return {name: one.grad for name, one in module.named_parameters() if one.grad is not None}


def set_gradients(pl_module: LightningModule, gradients: dict[str, torch.Tensor]) -> None:
    """Put back what :func:`held_gradients` gave."""
    for name, parameter in pl_module.named_parameters():
        if name in gradients:
            parameter.grad = gradients[name].to(parameter.device)


class Copies:
    """Copies of states as they are now, for a moment at which they have moved on.

    A tensor that has not changed since it was last copied is not copied again.

    Args:
        largest: Tensors of more bytes are not copied; with None, all are, large ones to the CPU.
    """

    def __init__(self, largest: int | None = 2**20) -> None:
        self.largest = largest
        self._seen: dict[tuple[Any, ...], tuple[torch.Tensor, int, torch.Tensor]] = {}

    def take(self, value: Any, *path: Any) -> Any:
        """A copy of tensors, and of dicts, lists and tuples of them. ``path``: names what is copied."""
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if isinstance(value, dict):
            return {key: self.take(item, *path, key) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)([self.take(item, *path, i) for i, item in enumerate(value)])
        return value

    def _tensor(self, tensor: torch.Tensor, path: tuple[Any, ...]) -> torch.Tensor:
        if self.largest is None and not tensor.is_meta:
            return tensor.detach().cpu() if tensor.is_cuda else tensor.detach().clone()
        if tensor.is_meta or tensor.nbytes > self.largest:
            return tensor
        version = -1 if tensor.is_inference() else tensor._version
        before = self._seen.get(path)
        if before is None or before[0] is not tensor or before[1] != version or version == -1:
            self._seen[path] = before = (tensor, version, tensor.detach().clone())
        return before[2]


def check_plain(value: Any, where: str) -> None:
    """Refuse state that torch's safe load would not read back.

    Raises:
        TypeError: something else than tensors, numbers, strings, booleans, None, and lists, tuples and dicts of them.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            check_plain(key, where)
            check_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            check_plain(item, f"{where}[{i}]")
    elif not (value is None or type(value) in (bool, int, float, str, bytes) or isinstance(value, torch.Tensor)):
        raise StateError(
            f"{where} is a {type(value).__name__}, which a checkpoint's safe load refuses. "
            "Keep tensors, numbers, strings, and lists, tuples and dicts of them."
        )
