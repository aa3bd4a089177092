"""The course of a dry run's memory: each allocation and release of tensors, when it was made and what it is for."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from eke.forecast.scratch import Scratch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CAUSES = ("parameters", "gradients", "optimizer", "activations", "temporary")
HOST = "host"  # what lies in CPU memory beside the GPU's


@dataclass
class _Life:
    """One allocation: its bytes over time, and what it counts as."""

    size: int
    born: str  # phase
    cause: str = ""


@dataclass
class Timeline(TorchDispatchMode):
    """Takes down every allocation and release of tensors, and reads ones where somebody reads a value.

    Attributes:
        phase: What the run is at: ``"forward"``, ``"backward"``, ``"optimizer"`` or ``""``.
        scratch: Tells what operators take for themselves while they run, which nobody sees from outside.
    """

    phase: str = ""
    events: list[tuple[int, int]] = field(default_factory=list)  # number of a life, and bytes more or less
    lives: list[_Life] = field(default_factory=list)
    alive: dict[int, int] = field(default_factory=dict)  # address of a storage to the number of its life
    scratch: Scratch | None = None
    open: list[tuple[int, Any]] = field(default_factory=list)  # places in events that wait for it

    def __post_init__(self) -> None:
        super().__init__()

    def __enter__(self) -> Timeline:
        self._resize = torch.UntypedStorage.resize_
        timeline = self

        def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            before = storage.nbytes()
            result = timeline._resize(storage, size)
            number = timeline.alive.get(storage._cdata)
            if number is None:
                timeline._begin(storage)
            elif size != before:
                timeline.events.append((number, size - before))
            if size > before:  # how FSDP gathers and lets go of weights, and nobody else does
                timeline.lives[timeline.alive[storage._cdata]].cause = "parameters"
            return result

        torch.UntypedStorage.resize_ = resize_
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind not in _PLAIN for kind in types):
            return NotImplemented  # a wrapper around tensors: what it does with them comes by here again
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            known = args[0].constant  # a number that was made into a tensor a moment ago
            return known.item() if known is not None else _one(args[0].dtype)
        if func is torch.ops.aten.equal.default:
            return True
        result = func(*args, **(kwargs or {}))
        self._remember(result)
        if self.scratch is not None and self.phase and (key := self.scratch.ask(func, args, kwargs or {})) is not None:
            self.open.append((len(self.events), key))
            self.lives.append(_Life(0, self.phase, "temporary"))
            self.events += [(len(self.lives) - 1, 0), (len(self.lives) - 1, -1)]
        return result

    def settle(self) -> None:
        """Fill in what kernels take for themselves, once all that is to be known of them is known."""
        known = self.scratch.answer() if self.scratch is not None else {}
        for place, key in self.open:
            self.events[place] = self.events[place][0], known[key]
        self.open = []

    def _remember(self, result: Any) -> None:
        if isinstance(result, Tensor):
            self._see(result)
        elif isinstance(result, (tuple, list)):
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._see(leaf)

    def _see(self, tensor: Tensor) -> None:
        if type(tensor) not in _PLAIN:
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self.alive:
            self._begin(storage)

    def _begin(self, storage: torch.UntypedStorage) -> None:
        size, key, number = storage.nbytes(), storage._cdata, len(self.lives)
        self.lives.append(_Life(size, self.phase))
        self.events.append((number, size))
        self.alive[key] = number
        weakref.finalize(storage, self._end, key, weakref.ref(storage))

    def _end(self, key: int, _: Any) -> None:
        number = self.alive.pop(key, None)
        if number is not None:
            self.events.append((number, -1))  # all that it has then

    def note(self, tree: Any, cause: str) -> None:
        """Say what the tensors in a structure count as."""
        for leaf in tree_leaves(tree):
            for tensor in _inside(leaf) if isinstance(leaf, Tensor) else ():
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self._begin(storage)
                self.lives[self.alive[storage._cdata]].cause = cause

    def call_living(self, cause: str, born: str) -> None:
        """What was made in a phase, and is still there, counts as this."""
        for number in self.alive.values():
            life = self.lives[number]
            if life.born == born and not life.cause:
                life.cause = cause

    def peak(self, begin: int, end: int) -> dict[str, int]:
        """Bytes by cause at the highest total between two places in ``events``."""
        now: dict[int, int] = {}
        total = highest = 0
        at: dict[int, int] = {}
        rising = False
        for place, (number, more) in enumerate(self.events[:end]):
            if not self._counts(number):
                continue
            before = now.get(number, 0)
            after = 0 if more == -1 else before + more
            if place >= begin and rising and after < before and total > highest:
                highest, at = total, dict(now)
            rising = after >= before
            total += after - before
            if after:
                now[number] = after
            else:
                now.pop(number, None)
        if total > highest:
            at = now
        found = dict.fromkeys(CAUSES, 0)
        for number, size in at.items():
            found[self.lives[number].cause or "temporary"] += size
        return found

    def _counts(self, number: int) -> bool:
        """Whether it is of the step: what was made outside of it, by loaders say, and is nothing known, is not."""
        life = self.lives[number]
        return bool(life.cause or life.born) and life.cause != HOST

    def on_host(self, number: int) -> bool:
        return self.lives[number].cause == HOST


def _inside(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor consists of."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            part = getattr(tensor, name)
            if isinstance(part, Tensor):  # a sharded one names its processes as well
                yield from _inside(part)
    else:
        yield tensor


_PLAIN = frozenset((Tensor, FakeTensor, nn.Parameter, nn.Buffer))


def _one(dtype: torch.dtype) -> Any:
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
