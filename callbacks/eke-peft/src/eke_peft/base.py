"""Which base an adapter belongs to, and what of a model is the base: names and a hash of what does not train.

Names are without torch.compile's part, so that a compiled base and a plain one are the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from eke.seams.names import match, match_parameters, parameter_names, plain, plain_keys
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from eke_peft.errors import PEFTError

HEADS = ("classifier", "score", "qa_outputs", "classification_head")  # what from_pretrained makes anew


def frozen_parameters(
    module: nn.Module, path: str, host: nn.Module, method: str | Any, targets: list[str] | None, train: list[str] | None
) -> dict[str, nn.Parameter]:
    """Parameters of the model as it came that will not train, by plain name.

    Args:
        module: The user's.
        path, host: Of the part that is adapted.
        method: Of tuning; ``"bitfit"`` trains biases of the host.
        targets: For bitfit, patterns of biases in the host.
        train: Patterns of parameters that train, by any of their names. None: what is outside of a host, and its head.

    Raises:
        NamesError: a pattern that meets no parameter.
        PEFTError: no bias for bitfit; a quantized parameter that should train.
    """
    inside = f"{plain(path)}." if path else ""
    every = {names[0]: parameter for parameter, names in parameter_names(module).items()}
    if train is not None:
        trains = set(match_parameters(module, train, "train"))
    else:
        own = {name for name in every if path and name.startswith(inside)}
        heads = {name for name in own if name.removeprefix(inside).split(".")[0] in HEADS}
        trains = (set(every) - own if path else set()) | heads
    if method == "bitfit":
        biases = [name.removeprefix(inside) for name in every if name.startswith(inside) and name.endswith("bias")]
        if not biases:
            raise PEFTError(f"{type(host).__name__} has no biases that BitFit could train. Try method='lora'.")
        trains |= {inside + name for name in (biases if targets is None else match(biases, targets, "targets"))}
    for name in trains:
        parameter = every[name]
        if not (parameter.is_floating_point() or parameter.is_complex()):
            part = name.removeprefix(inside).rpartition(".")[0]
            raise PEFTError(
                f"{name!r} should train, and is quantized ({parameter.dtype}). Load the model with "
                f"BitsAndBytesConfig(..., llm_int8_skip_modules=[{part!r}]), or leave it out of train=."
            )
    return {name: parameter for name, parameter in every.items() if name not in trains}


def fingerprint(parameters: Mapping[str, Tensor], sample: int = 4096) -> str:
    """A hash of parameters: names, shapes, dtypes, and evenly spaced numbers of each.

    Args:
        parameters: By name, before anything is put into the model.
        sample: Numbers of each tensor that are looked at, first and last among them.
    """
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in parameters.items():
        flat = tensor.detach().reshape(-1)
        places = torch.linspace(0, max(0, flat.numel() - 1), min(sample, flat.numel()), dtype=torch.float64).long()
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        if flat.numel() and not isinstance(tensor, FakeTensor):  # a forecast's have no content
            found.update(flat[places.to(flat.device)].float().cpu().numpy().tobytes())
    return found.hexdigest()


def trained_names(module: nn.Module) -> set[str]:
    """Names of what a checkpoint of the adapter holds: parameters that train, and buffers, which training may move."""
    names = {name for p, names in parameter_names(module).items() if p.requires_grad for name in names}
    moved = {plain(name) for name, _ in module.named_buffers() if "running_" in name or "num_batches" in name}
    return (names | moved) & set(plain_keys(module.state_dict()))


def completed(module: nn.Module, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A whole state for a module, of what a checkpoint of the adapter holds and of the module's own base.

    Raises:
        PEFTError: something trains that the checkpoint does not hold.
    """
    saved = plain_keys(saved)
    if lost := sorted(trained_names(module) - set(saved)):
        raise PEFTError(f"the checkpoint holds no {lost[0]!r}, which trains in this run: its train= or method differ.")
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    own = {name for name, _ in tensors}  # no notes of quantizers
    whole = {name: saved.get(plain(name), value) for name, value in module.state_dict().items() if name in own}
    known = {plain(name) for name in whole}
    return whole | {name: value for name, value in saved.items() if name not in known}


def plain_values(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(plain_values(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [plain_values(item) for item in value]
    if isinstance(value, Enum):
        return plain_values(value.value)
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
