"""A card that is none: tensors that say they are on ``cuda:0`` and are computed on the CPU.

An operator that gets tensors of both devices fails as it would on a GPU, and so do a CPU generator that draws for the
card, and a tensor of the card that goes to NumPy. What is random is drawn from the CPU's state, kernels are the CPU's,
and nothing is said about speed or memory. It finds mixed-up devices before a GPU's minutes are spent on them.

    python tools/pretend_card.py               # the contract of all techniques, in its shortest form
    python tools/pretend_card.py peft mae
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CARD = torch.device("cuda:0")
_Real = torch.Generator
_drawing: set[int] = set()  # generators of the card
_kept: list[Any] = []  # they live as long as this process: an id must not come again


class Carded(Tensor):
    """A tensor on the card. ``inner`` lies in CPU memory."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Carded:
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, requires_grad=inner.requires_grad,
        )  # fmt: skip
        made.inner = inner.detach()
        return made

    # Only Python is told: autograd would look for the streams of a real card.
    device = property(lambda self: CARD)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self) -> int:
        return 0

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        return torch.ops.aten._to_copy(self, device=torch.device("cpu"))

    def cuda(self, *_: Any, **__: Any) -> Tensor:
        return self

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(
            *(tuple(("cpu",) if isinstance(one, Tensor) and not isinstance(one, Carded) else (one.dtype,)
                    if isinstance(one, Tensor) else (one,) for one in args[:1])[0] if args else ()),
            *args[1:], **{key: value for key, value in kwargs.items() if key != "copy"},
        )  # fmt: skip
        away = device is not None and torch.device(device).type == "cpu"
        if not away and (dtype is None or dtype == self.dtype) and not kwargs.get("copy"):
            return self
        return torch.ops.aten._to_copy(self, dtype=dtype, device=torch.device("cpu") if away else None)

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self) -> str:
        return f"Carded({self.inner})"

    def __reduce_ex__(self, protocol: int) -> Any:  # as loaded with map_location="cpu"
        plain = self.inner.clone()
        if isinstance(self, torch.nn.Parameter):
            return torch.nn.Parameter(plain, self.requires_grad).__reduce_ex__(protocol)
        return plain.requires_grad_(self.requires_grad).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict) -> Carded:
        if id(self) not in memo:
            copied = Carded(self.inner.clone())
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, self.requires_grad)
            else:
                copied.requires_grad_(self.requires_grad)
            memo[id(self)] = copied
        return memo[id(self)]

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor first.")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Generator(torch.Generator):
    """Remembers which device it draws for."""

    def __new__(cls, device: Any = "cpu") -> Any:
        made = _Real.__new__(_Real, "cpu")
        if torch.device(device).type == "cuda":
            _drawing.add(made._cdata)
            _kept.append(made)
        return made


class Pretend(TorchDispatchMode):
    """Sees what is made on the card."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


REAL = ("adam8bit", "adam8bit, torchao", "fp8, torchao tensorwise", "fp8, torchao rowwise", "peft, nf4")  # need a card
CHECKS = ("accumulated_gradients_resumes", "it_trains_and", "fails_cleanly", "fits_twice", "weights_only", "pickles")
MOVES = {"_to_copy", "copy_", "_copy_from", "to", "record_stream", "_pin_memory", "is_pinned"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}  # a GPU takes their indices from the CPU


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.partition("::")[2]
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    carded = [leaf for leaf in leaves if isinstance(leaf, Carded)]
    asked = kwargs.get("device")
    here = bool(carded) if asked is None else torch.device(asked).type == "cuda"
    if carded and name.startswith("new_") or name.endswith("_like"):
        here = bool(carded)  # autograd asks for the device that it thinks a tensor has
    if carded and name not in MOVES:
        others = [leaf for leaf in leaves if not isinstance(leaf, Carded) and leaf.ndim]
        if name in INDEXED:
            others = [leaf for leaf in others if not any(leaf is one for one in args[1])]
        if others:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu! ({func})")
    generator = kwargs.get("generator")
    if generator is not None and generator._cdata in _drawing:
        here = True  # it says that it is on the CPU, and who asks it makes what is drawn there
    elif generator is not None and here:
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' ({func})")
    if name == "_fused_sdp_choice":
        return 0  # written out: the other kernels have a name for each device
    if name == "is_pinned":
        return False
    if name in ("_pin_memory", "record_stream"):
        return args[0]
    unwrapped, named = tree_map(lambda leaf: leaf.inner if isinstance(leaf, Carded) else leaf, (args, kwargs))
    if asked is not None:
        named = {**named, "device": torch.device("cpu")}
    if named.get("pin_memory"):
        named = {**named, "pin_memory": False}
    with torch._C._DisableTorchDispatch():
        result = func(*unwrapped, **named)
    if name.endswith("_") and not name.endswith("__") or kwargs.get("out") is not None:
        return kwargs.get("out") if kwargs.get("out") is not None else args[0]
    if name == "_to_copy" and asked is None:
        here = isinstance(args[0], Carded)
    if name == "_foreach" or (func._schema.is_mutable and result is None):
        return result
    if not here:
        return result
    known = {id(one.inner): one for one in carded}

    def wrapped(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or isinstance(leaf, Carded):
            return leaf
        return known.get(id(leaf)) if id(leaf) in known else Carded(leaf)

    return tree_map(wrapped, result)


def _made(function: Any) -> Any:
    def make(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if isinstance(data, Carded) and device is None:
            return data if function.__name__ == "as_tensor" else data.clone()
        if isinstance(data, Carded):
            return data.to(device)
        made = function(data, *args, **kwargs)
        return made if device is None or torch.device(device).type != "cuda" else Carded(made)

    return make


def _to(function: Any) -> Any:
    """For a tensor that is like another one, which is on the card where only Python knows it."""

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Carded) and not isinstance(self, Carded):
            return torch.ops.aten._to_copy(self, dtype=args[0].dtype, device=CARD)
        return function(self, *args, **kwargs)

    return to


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    count = num_classes if num_classes >= 0 else int(tensor.max()) + 1
    return (tensor[..., None] == torch.arange(count, device=tensor.device)).long()


def _moved(apply: Any) -> Any:
    """Keep a parameter's identity, as a real move does, where nothing else holds on to it."""

    def _apply(self: torch.nn.Module, fn: Any, recurse: bool = True) -> torch.nn.Module:
        for child in self.children() if recurse else ():
            child._apply(fn)
        for swap in (True, False):
            torch.__future__.set_swap_module_params_on_conversion(swap)
            try:
                return apply(self, fn, recurse=False)
            except RuntimeError as error:
                if not swap or "Couldn't swap" not in str(error):
                    raise
        return self

    return _apply


def install() -> None:
    """Make this process believe that it has a card."""
    from lightning.pytorch.accelerators import CUDAAccelerator

    torch._C._ensureCUDADeviceGuardSet()
    torch.cuda._lazy_init = lambda: None
    torch.nn.Module._apply = _moved(torch.nn.Module._apply)
    torch.Generator = Generator
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.synchronize, torch.cuda.max_memory_allocated = lambda *_: None, lambda *_: 0
    torch.Tensor.to, torch.Tensor.type_as = _to(torch.Tensor.to), _to(torch.Tensor.type_as)
    torch.nn.functional.one_hot = _one_hot  # which makes its numbers where autograd thinks the classes are
    for name in ("tensor", "as_tensor"):  # which hide from dispatch
        setattr(torch, name, _made(getattr(torch, name)))
    CUDAAccelerator.is_available = staticmethod(lambda: True)
    CUDAAccelerator.setup_device = lambda self, device: None
    CUDAAccelerator.get_parallel_devices = staticmethod(lambda devices: [CARD])
    CUDAAccelerator.parse_devices = staticmethod(lambda devices: [0])
    CUDAAccelerator.auto_device_count = staticmethod(lambda: 1)
    CUDAAccelerator.teardown = lambda self: None
    CUDAAccelerator.setup = lambda self, trainer: None
    Pretend().__enter__()


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    import gpu_contract

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("techniques", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("pretended.json"))
    parser.add_argument("--seconds", type=float, default=3600)
    given = parser.parse_args()
    everything = gpu_contract.contracts

    def chosen(only: str = "*") -> dict[str, type]:
        from eke_attention import plugin

        plugin.flex = plugin.gathered  # which has a backward on a CPU
        found = {name: one for name, one in everything().items() if name not in REAL}
        return {name: one for name, one in found.items()
                if not given.techniques or name.partition(",")[0] in given.techniques}  # fmt: skip

    gpu_contract.contracts = chosen
    gpu_contract.with_capability_told = lambda device: None

    gpu_contract.CHECKS = tuple(one for one in gpu_contract.CHECKS if any(word in one[0] for word in CHECKS))
    started = gpu_contract._one

    def one(contract: type, device: str, place: Path) -> None:
        install()
        contract.options = {**contract.options, "inference_mode": False}  # which a tensor made in Python does not bear
        started(contract, device, place)

    gpu_contract._one = one

    def write(results: dict[str, Any]) -> None:
        given.out.write_text(json.dumps(results, indent=1) + "\n")

    results = gpu_contract.run_all("cuda", given.seconds, 2, write, fresh=False)
    for name, outcomes in results.items():
        bad = {check: outcome for check, outcome in outcomes.items() if str(outcome).startswith("FAILED")}
        print(name, "passed" if not bad else json.dumps(bad, indent=1))


if __name__ == "__main__":
    main()
