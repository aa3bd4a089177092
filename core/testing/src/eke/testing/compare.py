"""What is the state of a training run, taken out as plain data and compared exactly."""

from __future__ import annotations

import random
import sys
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def random_state() -> dict[str, int]:
    """Checksums of the global random states that user code draws from."""
    states = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    if "numpy" in sys.modules:
        numpy = sys.modules["numpy"]
        states["numpy"] = [getattr(part, "tolist", lambda part=part: part)() for part in numpy.random.get_state()]
    return {name: checksum(state) for name, state in states.items()}


def checksum(value: Any) -> int:
    """A number that tells two batches or states apart: tensors count with shape, dtype and every byte."""
    if isinstance(value, Tensor):
        data = local(value).cpu().contiguous().reshape(-1)
        content = data.view(torch.uint8).numpy().tobytes() if data.numel() else b""
        return zlib.crc32(content, zlib.crc32(f"{tuple(value.shape)}{value.dtype}".encode()))
    if isinstance(value, Mapping):
        return checksum([list(value), [checksum(item) for item in value.values()]])
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return zlib.crc32(repr([checksum(item) for item in value]).encode())
    return zlib.crc32(repr(value).encode())


def copied(value: Any) -> Any:
    """Copy nested data, each tensor detached and in CPU memory; of a sharded one this process's part.

    States cross from process to process, and one that forks others must not have met the card.
    """
    if isinstance(value, Tensor):
        return local(value).to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [copied(item) for item in value]
    return value


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, which is all of it unless it is sharded."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def differences(first: Any, second: Any, tolerance: float = 0.0, name: str = "") -> list[str]:
    """Name every place where two nested states differ, a line each.

    Args:
        first: Dicts, lists, tensors and plain values, nested.
        second: The same.
        tolerance: Largest absolute difference of floating-point tensors and numbers that counts as equal.
            0 asks for the same bits, dtypes and shapes.
        name: Where the two stand, put before each line.
    """
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return _tensor_differences(first, second, tolerance, name)
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        lost = [f"{_under(name, key)} is missing in the second" for key in first if key not in second]
        new = [f"{_under(name, key)} is missing in the first" for key in second if key not in first]
        shared = [key for key in first if key in second]
        return (
            lost
            + new
            + [line for key in shared for line in differences(first[key], second[key], tolerance, _under(name, key))]
        )
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        if len(first) != len(second):
            return [f"{name} has {len(first)} entries, then {len(second)}"]
        return [
            line
            for i, (one, other) in enumerate(zip(first, second, strict=True))
            for line in differences(one, other, tolerance, _under(name, i))
        ]
    if isinstance(first, float) and isinstance(second, float):
        same = first == second or first != first and second != second or abs(first - second) <= tolerance
        return [] if same else [f"{name} is {first!r}, then {second!r}"]
    return [] if type(first) is type(second) and first == second else [f"{name} is {first!r}, then {second!r}"]


def assert_same(first: Any, second: Any, what: str, tolerance: float = 0.0, show: int = 8) -> None:
    """Raise an AssertionError that says ``what`` and names the places that differ."""
    found = differences(first, second, tolerance)
    if found:
        more = [f"... and {len(found) - show} more"] if len(found) > show else []
        limit = f" (allowed: {tolerance:g})" if tolerance else ""
        raise AssertionError("\n  ".join([f"{what}{limit}:", *found[:show], *more]))


def footprint(model: nn.Module) -> dict[str, dict[str, Any]]:
    """How each module stands, apart from its values: class, attributes on the instance, hooks, wrapped methods."""
    return {name or "(the module itself)": _stand(module) for name, module in model.named_modules()}


def class_attributes(model: nn.Module) -> dict[str, dict[str, int]]:
    """The attributes of every class that the model is made of, by identity: a patched class shows."""
    from lightning.pytorch import LightningModule, Trainer

    classes = {cls for module in model.modules() for cls in type(module).__mro__} | {Trainer, LightningModule}
    return {
        f"{cls.__module__}.{cls.__qualname__}": {
            key: id(value) for key, value in vars(cls).items() if not (key.startswith("__") or key == "_abc_impl")
        }
        for cls in classes - {object}
    }


def _stand(module: nn.Module) -> dict[str, Any]:
    attributes = vars(module)
    return {
        "class": f"{type(module).__module__}.{type(module).__qualname__}",
        "attributes": {key: "there" for key in sorted(attributes)},
        "hooks": {
            key: len(value) for key, value in attributes.items() if key.endswith("_hooks") and isinstance(value, dict)
        },
        "replaced methods": sorted(
            key for key, value in attributes.items() if callable(value) and hasattr(type(module), key)
        ),
    }


def _tensor_differences(first: Tensor, second: Tensor, tolerance: float, name: str) -> list[str]:
    if first.shape != second.shape:
        return [f"{name} has shape {tuple(first.shape)}, then {tuple(second.shape)}"]
    if first.dtype != second.dtype:
        return [f"{name} is {first.dtype}, then {second.dtype}"]
    if torch.equal(first, second):
        return []
    if not first.dtype.is_floating_point:
        return [f"{name} differs in {int((first != second).sum())} of {first.numel()} values"]
    gap = (first.double() - second.double()).abs().nan_to_num(nan=float("inf")).max().item()
    both_nan = first.isnan() & second.isnan()
    if gap == float("inf") and torch.equal(first[~both_nan], second[~both_nan]):
        return []
    return [] if gap <= tolerance else [f"{name} differs by {gap:.3g}"]


def _under(name: str, key: object) -> str:
    return f"{name}[{key!r}]" if name else str(key)
