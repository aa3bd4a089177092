"""What autograd keeps between forward and backward, packed by codecs that several techniques share.

The tricks it hides. torch's hooks for saved tensors form a stack of which only the top pair acts, so two techniques
that each push a pair are one: here is one pair for all of them. What a hook keeps is kept as it is given, and an output
of the operation that saves it leads back to that operation: a circle, so that memory outlives backward. torch looks
whether a saved tensor was changed in place, but not with hooks; this does it again. An address names a tensor only as
long as it lives, and what has been packed may die at once, so shared storages are told by weak references. And who is
speaking is read off Python's own stack: no hooks on modules, nothing to take off, the same inside compiled blocks.

What lies inside a region that is recomputed (:mod:`eke.seams.recompute`, ``torch.utils.checkpoint``) is not seen here:
the region's own hooks are on top. The region's inputs are.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from eke import compat
from eke.spec import EkeError

COMPRESS, OFFLOAD = 0, 100  # priorities: first fewer bytes, then to another place


class SavedError(EkeError, RuntimeError):
    """A codec gave back another tensor than it took, or what it was given was changed in place before backward."""


@dataclass(frozen=True)
class Place:
    """Where in forward a tensor is saved.

    Attributes:
        path: Dotted path of the innermost module that is running, ``""`` for the model itself and for the loss. A
            compiled block is one module.
        number: How many tensors this module had saved in this pass before, weights left out. With the path it names
            the same tensor in every pass of a model that computes the same.
        needs_grad: A gradient flows through the tensor. Statistics of norms and attention, masks and the batch itself
            have none, and are small or needed exactly.
        begins_region: A region that is recomputed begins with it. Changed, it changes all that is recomputed.
    """

    path: str
    number: int
    needs_grad: bool
    begins_region: bool


class Codec:
    """Packs tensors for the time between forward and backward. Both methods run without gradients.

    Class attributes:
        exact: What is decoded has the bits of what was encoded. Others are not offered what begins a recomputed region.
        integers: Integer and boolean tensors are offered too.
    """

    exact: ClassVar[bool] = False
    integers: ClassVar[bool] = False

    def encode(self, tensor: Tensor, place: Place) -> tuple[Sequence[Tensor], Any] | None:
        """Return what is kept in its place, tensors and whatever else :meth:`decode` needs; or None to decline.

        Weights and their views are never offered, nor is the same memory twice in a pass. Later codecs pack the
        tensors that are returned. Do not keep ``tensor`` itself: it would live on.
        """
        raise NotImplementedError

    def decode(self, parts: Sequence[Tensor], how: Any) -> Tensor:
        """Return the tensor, in its shape and dtype and on its device. Backward may ask several times, and in any
        order: leave ``parts`` as they are."""
        raise NotImplementedError


@dataclass
class Counts:
    """Bytes that one forward pass left for backward, each storage once, weights and buffers not at all.

    Attributes:
        before: As it would be without codecs.
        after: As it is: by the name of the codec that came last, ``""`` for what none of them took.
    """

    before: int = 0
    after: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return sum(self.after.values())


class Saved:
    """The saved tensors of one run.

    Example::

        saved = Saved(model)
        saved.register("int8", Int8(), COMPRESS)
        with saved.forward():
            loss = model(batch)
        loss.backward()

    Args:
        module: Whose modules have names, and whose weights and buffers are left alone.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.counts = Counts()
        self._codecs: list[tuple[int, str, Codec]] = []
        self._active = False
        self._names: dict[int, str] = {}
        self._pass = _Pass()

    def register(self, name: str, codec: Codec, priority: int) -> None:
        """Let a codec take part from the next forward pass on.

        Args:
            name: Of the technique, once in a run.
            codec: What it does.
            priority: Lower ones act first: :data:`COMPRESS`, :data:`OFFLOAD` or between. The order of registration
                does not count; of two with the same priority the name decides.

        Raises:
            SavedError: the name is taken.
        """
        if any(name == other for _, other, _ in self._codecs):
            raise SavedError(f"{name!r} packs saved tensors already. Remove it first, or register another name.")
        self._codecs = sorted([*self._codecs, (priority, name, codec)], key=lambda one: one[:2])

    def remove(self, name: str) -> None:
        """Leave a codec out from the next forward pass on. What it has packed can still be decoded."""
        self._codecs = [one for one in self._codecs if one[1] != name]

    @contextmanager
    def forward(self) -> Iterator[Counts]:
        """Pack what is saved inside the block. Within another such block, and without codecs, it does nothing.

        Yields:
            What is counted, complete when the block ends.
        """
        if self._active or not self._codecs:
            yield self.counts
            return
        self._active, self.counts, self._pass = True, Counts(), _Pass()
        self._names = {id(one): path for path, one in self.module.named_modules()}
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            if not _wraps_others(tensor):
                self._pass.weights.put(tensor.untyped_storage(), True)
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
                yield self.counts
        finally:
            self._active, self._names, self._pass = False, {}, _Pass()

    def around(self, call_next: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A layer of ``training_step``: what the step saves is packed."""
        with self.forward():
            return call_next(*args, **kwargs)

    def close(self) -> None:
        """Forget all codecs."""
        self._codecs = []

    def _pack(self, tensor: Tensor) -> Any:
        if compat.in_backward():  # manual optimization calls it inside: recomputed regions, gradients of gradients
            return _AsItIs(tensor)
        with torch.no_grad():
            if self._is_weight(tensor):
                return _AsItIs(tensor)
            self._count_before(tensor)
            if not _plain(tensor):
                return self._keep(tensor)
            return self._packed(tensor)

    def _packed(self, tensor: Tensor) -> Any:
        once = _without_repeats(tensor)
        storage, dense = once.untyped_storage(), _is_dense(once)
        where = (once.storage_offset(), once.dtype, once._version)
        key = (*where, once.numel()) if dense else (*where, once.shape, once.stride())
        records = self._pass.records.get(storage) or self._pass.records.put(storage, {})
        record = records.get(key, _nothing)()
        if record is None:
            place = self._place(tensor.requires_grad)
            packed = self._encode(once, place, self._codecs)
            if packed is None:
                return self._keep(tensor)
            record = _Record(packed, once, dense)
            records[key] = weakref.ref(record)
        return _Handle(record, once.shape, once.stride(), tensor.shape)

    def _encode(self, tensor: Tensor, place: Place, codecs: Sequence[tuple[int, str, Codec]]) -> _Packed | None:
        for number, (_, name, codec) in enumerate(codecs, 1):
            if place.begins_region and not codec.exact:
                continue
            if not (tensor.dtype.is_floating_point or tensor.is_complex() or codec.integers):
                continue
            if (done := codec.encode(tensor, place)) is None:
                continue
            parts: list[_Packed | _AsItIs] = []
            for part in (part.detach() for part in done[0]):
                packed = self._encode(part, place, codecs[number:])
                if packed is None:
                    self._count_after(part, name)
                parts.append(packed or _AsItIs(part))
            return _Packed(name, codec, parts, done[1])
        return None

    def _keep(self, tensor: Tensor) -> _AsItIs:
        self._count_after(tensor, "")
        return _AsItIs(tensor)

    def _place(self, needs_grad: bool) -> Place:
        path, region = self._speaker()
        number = self._pass.numbers[path]
        self._pass.numbers[path] += 1
        return Place(path, number, needs_grad, region)

    def _speaker(self) -> tuple[str, bool]:
        """The innermost module that is being called, and whether a region's inputs are being saved.

        Inside a region nothing gets here, so a line of torch's checkpointing between the module and us is about to
        enter one.
        """
        frame, region = sys._getframe(1), False
        while frame is not None:
            if frame.f_code in compat.MODULE_CALLS:
                path = self._names.get(id(frame.f_locals["self"]))
                if path is not None:
                    return path, region
            elif frame.f_code.co_filename == checkpoint.__file__:
                region = True
            frame = frame.f_back
        return "", region

    def _is_weight(self, tensor: Tensor) -> bool:
        if isinstance(compat.base_of(tensor), nn.Parameter):
            return True
        if not _wraps_others(tensor) and self._pass.weights.get(tensor.untyped_storage()):
            return True
        return _from_weight(tensor.grad_fn)

    def _count_before(self, tensor: Tensor) -> None:
        for storage in _storages(tensor):
            if self._pass.before.get(storage) is None:
                self._pass.before.put(storage, True)
                self.counts.before += storage.nbytes()

    def _count_after(self, tensor: Tensor, name: str) -> None:
        for storage in _storages(tensor):
            if self._pass.after.get(storage) is None:
                self._pass.after.put(storage, True)
                self.counts.after[name] += storage.nbytes()


class _ByStorage:
    """A value for each storage, while it lives: another one may come to lie at its address."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Any], Any]] = {}

    def get(self, storage: Any) -> Any:
        reference, value = self._entries.get(id(storage), (_nothing, None))
        return value if reference() is storage else None

    def put(self, storage: Any, value: Any) -> Any:
        self._entries[id(storage)] = weakref.ref(storage), value
        return value


class _Pass:
    """What is known during one forward pass. It holds nothing alive."""

    def __init__(self) -> None:
        self.weights, self.records, self.before, self.after = _ByStorage(), _ByStorage(), _ByStorage(), _ByStorage()
        self.numbers: Counter[str] = Counter()


class _AsItIs:
    """A tensor that nobody packed."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor if tensor.is_leaf else tensor.detach()  # an output would hold the node that holds it
        self.version = tensor._version

    def get(self) -> Tensor:
        if self.tensor._version != self.version:
            raise SavedError(
                f"A tensor of shape {tuple(self.tensor.shape)} that backward needs was changed in place after it was "
                "saved, so its gradient would be wrong. Do not write into it before backward, or clone it first."
            )
        return self.tensor


@dataclass(slots=True)
class _Packed:
    """What a codec made of a tensor."""

    name: str
    codec: Codec
    parts: list[Any]  # each packed by a later codec, or as it is
    how: Any

    def get(self) -> Tensor:
        return self.codec.decode([part.get() for part in self.parts], self.how)


class _Record:
    """One piece of memory, packed once."""

    __slots__ = ("__weakref__", "dense", "dtype", "packed", "shape", "stride")

    def __init__(self, packed: _Packed, tensor: Tensor, dense: bool) -> None:
        self.packed, self.dense = packed, dense
        self.shape, self.stride, self.dtype = tensor.shape, tensor.stride(), tensor.dtype


@dataclass(slots=True)
class _Handle:
    """One tensor in a piece of memory: what autograd holds in its place."""

    record: _Record
    shape: torch.Size
    stride: tuple[int, ...]
    expanded: torch.Size


def _unpack(held: _AsItIs | _Handle) -> Tensor:
    if isinstance(held, _AsItIs):
        return held.get()
    record = held.record
    with torch.no_grad():
        tensor = record.packed.get()
        if tensor.shape != record.shape or tensor.dtype != record.dtype:
            raise SavedError(
                f"The codec {record.packed.name!r} took a tensor of {_said(record.shape, record.dtype)} and gave back "
                f"one of {_said(tensor.shape, tensor.dtype)}. decode() has to undo encode()."
            )
        if record.dense and tensor.stride() != record.stride:
            # In the order in which it lay in memory: views go by it, and kernels sum by it.
            like = torch.empty_strided(record.shape, record.stride, dtype=tensor.dtype, device=tensor.device)
            tensor = like.copy_(tensor)
        if record.dense and (held.shape != record.shape or held.stride != record.stride):
            tensor = tensor.as_strided(held.shape, held.stride)
        return tensor if held.expanded == held.shape else tensor.expand(held.expanded)


def _said(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"shape {tuple(shape)} and {str(dtype).removeprefix('torch.')}"


def _plain(tensor: Tensor) -> bool:
    """An ordinary tensor, whose memory is what it shows."""
    return (
        tensor.layout == torch.strided
        and not tensor.is_nested
        and not _wraps_others(tensor)
        and _bytes(_without_repeats(tensor)) <= tensor.untyped_storage().nbytes()  # or its elements overlap
        and tensor.numel() > 0
    )


def _bytes(tensor: Tensor) -> int:
    """Not ``nbytes``, which code that is compiled for several sizes cannot ask for."""
    return tensor.numel() * tensor.element_size()


def _wraps_others(tensor: Tensor) -> bool:
    """A tensor that consists of tensors, such as a sharded or quantized one."""
    return hasattr(tensor, "__tensor_flatten__")


def _without_repeats(tensor: Tensor) -> Tensor:
    """What an expanded tensor was expanded from."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _is_dense(tensor: Tensor) -> bool:
    """Its elements lie in memory without gaps, in whatever order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _storages(tensor: Tensor) -> Iterator[Any]:
    if _wraps_others(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            part = getattr(tensor, name)
            if isinstance(part, Tensor):  # a sharded one names its processes as well
                yield from _storages(part)
    elif tensor.layout == torch.strided:
        yield tensor.untyped_storage()


# Under autocast a layer saves a copy of its weight, with memory of its own.
_PASSES_ON = frozenset(
    f"{name}Backward0"
    for name in (
        "T", "Transpose", "View", "Permute", "ToCopy", "AsStrided", "Expand", "Slice", "Select", "UnsafeView",
        "ReshapeAlias", "Alias", "Unsqueeze", "Squeeze",
    )
)  # fmt: skip


def _from_weight(node: Any) -> bool:
    """A parameter, cast or looked at in another way, and nothing else."""
    for _ in range(8):
        if node is None:
            return False
        if isinstance(getattr(node, "variable", None), nn.Parameter):
            return True
        if node.name() not in _PASSES_ON:
            return False
        node = node.next_functions[0][0]
    return False


def _nothing() -> None:
    return None
