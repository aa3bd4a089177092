"""Adapters outside of a run: peft's own files, merging, several in one model."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from eke.seams.layers import place
from eke.seams.names import at, parameter_names, plain, plain_keys
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import nn

from eke_peft.adapters import Adapter
from eke_peft.errors import PEFTError
from eke_peft.intrinsic import remove_intrinsic
from eke_peft.methods import close_fast_path, open_fast_path
from eke_peft.prompts import Prompts
from eke_peft.quantized import LAYERS

WEIGHTS = "adapter_model.safetensors"


def host_of(module: nn.Module, path: str | None = None) -> tuple[str, nn.Module]:
    """The part of a model that is adapted: the one Hugging Face model inside, or all of it.

    Raises:
        PEFTError: no such part, or several Hugging Face models.
    """
    if path is not None:
        try:
            return path, module.get_submodule(path)
        except AttributeError:
            children = ", ".join(name for name, _ in module.named_children())
            raise PEFTError(f"{type(module).__name__} has no part {path!r}; it has {children}.") from None
    found = [
        (name, part) for name, part in module.named_modules()
        if isinstance(part, PeftModel) or (hasattr(part, "from_pretrained") and hasattr(part, "config"))
    ]  # fmt: skip
    outer = [
        (name, part)
        for name, part in found
        if not any(name.startswith(f"{other}.") or (not other and name) for other, _ in found)
    ]
    if len(outer) > 1:
        raise PEFTError(
            f"{type(module).__name__} holds {', '.join(name for name, _ in outer)}. Say which: host='{outer[0][0]}'."
        )
    return outer[0] if outer else ("", module)


def export(module: nn.Module, folder: str | Path, name: str = "default", host: str | None = None) -> Path:
    """Write an adapter as peft does, for ``PeftModel.from_pretrained(base, folder)``, with what of the model trained
    beside it, such as a new head.

    Args:
        module: A LightningModule or model that :class:`~eke_peft.PEFT` has adapted.
        folder: Where to. What lies there under peft's names is written over once all is complete.
        name: Of the adapter.
        host: Path of the adapted part, where :func:`host_of` needs help.

    Raises:
        PEFTError: there is none, or it is of a method that peft does not know, or what trained lies inside of a layer
            that has an adapter.

    What trained outside of the host is not in these files, and a warning says so.
    """
    path, base = host_of(module, host)
    configs = getattr(base, "peft_config", None)
    if not configs or name not in configs:
        raise PEFTError(f"{type(base).__name__} has no adapter {name!r} of peft's; it has {sorted(configs or ())}.")
    if writers := (getattr(module, "eke_peft", None) or {}).get("writers"):
        raise PEFTError(
            f"{writers[0]!r} has written to the weights beneath the adapter, which alone is none of the base that peft "
            "would load. Merge it (eke_peft.merge) and save the whole model."
        )
    state = get_peft_model_state_dict(base, adapter_name=name)
    config = copy.deepcopy(configs[name])
    if not isinstance(base, PeftModel):
        beside = _beside(base)
        for part in beside:
            state |= {f"{part}.{key}": value for key, value in at(base, part).state_dict().items()}
        state = plain_keys(state)
        if beside:
            config.modules_to_save = [*(config.modules_to_save or ()), *beside]
        state = {f"base_model.model.{key}": value for key, value in state.items()}
    inside = f"{path}." if path else ""
    if left := [key for key, p in module.named_parameters() if p.requires_grad and not key.startswith(inside)]:
        rank_zero_warn(f"{left[0]!r} trained, and lies outside of what peft's files hold: save it apart.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{WEIGHTS}.part"
    save_file({key: value.detach().cpu().contiguous().clone() for key, value in state.items()}, part)
    config.inference_mode = True
    config.save_pretrained(folder)
    part.replace(folder / WEIGHTS)
    return folder


def _beside(base: nn.Module) -> list[str]:
    """Modules that trained beside the adapter's layers, a tied one under each of its names."""
    adapted = [
        plain(name) for name, part in base.named_modules() if isinstance(part, (BaseTunerLayer, ModulesToSaveWrapper))
    ]
    found = set()
    for parameter, names in parameter_names(base).items():
        if not parameter.requires_grad:
            continue
        for name in names:
            layer = next((one for one in adapted if name.startswith(f"{one}.")), None)
            if layer is None:
                found.add(name.rpartition(".")[0])
            elif f"{layer}.base_layer." in name:
                raise PEFTError(
                    f"{name!r} trained beside an adapter of its layer, which peft's files have no place for."
                )
    if "" in found:
        raise PEFTError("a parameter of the model itself, in no module of its own, trained: peft's files have no "
                        "place for it.")  # fmt: skip
    return sorted(found)


def load_adapter(module: nn.Module, folder: str | Path, name: str = "default", host: str | None = None) -> None:
    """Put an adapter that peft, or :func:`export`, has written into a model, beside those that are there.

    Raises:
        PEFTError: the file holds what the model has no place for, or lacks what it has.
    """
    _, base = host_of(module, host)
    config = PeftConfig.from_pretrained(str(folder))
    inject_adapter_in_model(config, base, adapter_name=name)
    for part in base.modules():
        if isinstance(part, nn.TransformerEncoderLayer):
            close_fast_path(part)
    state = {key.removeprefix("base_model.model."): value for key, value in load_file(Path(folder) / WEIGHTS).items()}
    outcome = set_peft_model_state_dict(base, state, adapter_name=name)
    unknown = list(getattr(outcome, "unexpected_keys", ()))
    expected = set(get_peft_model_state_dict(base, adapter_name=name))
    lost = sorted(expected - set(state))
    if unknown or lost:
        raise PEFTError(f"the adapter in {folder} does not fit: {', '.join((unknown or lost)[:3])}.")


def set_adapter(module: nn.Module, *names: str) -> None:
    """Switch to these adapters, which act together; with none, to the base alone.

    Raises:
        PEFTError: no layer has one of this name.
    """
    layers = [part for part in module.modules() if isinstance(part, (BaseTunerLayer, ModulesToSaveWrapper))]
    known = {name for part in layers if isinstance(part, BaseTunerLayer) for name in _names(part)}
    if missing := [name for name in names if name not in known]:
        raise PEFTError(f"no adapter {missing[0]!r}; there are {', '.join(sorted(known)) or 'none'}.")
    for part in layers:
        part.enable_adapters(bool(names))
        if names:
            own = [name for name in names if not isinstance(part, BaseTunerLayer) or name in _names(part)]
            part.set_adapter(own if isinstance(part, BaseTunerLayer) else own[0])


def _names(layer: BaseTunerLayer) -> set[str]:
    return {key for attribute in layer.adapter_layer_names for key in getattr(layer, attribute)}


@torch.no_grad()
def merge(module: nn.Module) -> nn.Module:
    """Add adapters to the weights they adapt, and take them out: the plain model again, with the names it had.

    Raises:
        PEFTError: a quantized weight, which would be rounded again; or what cannot be merged.
    """
    if any(isinstance(part, (Adapter, Prompts)) for part in module.modules()):
        raise PEFTError("bottleneck adapters and prompts are no sums of weights, and cannot be merged.")
    if any(isinstance(part, PeftModel) for part in module.modules()):
        raise PEFTError("prompts are no sums of weights, and cannot be merged.")
    layers = [(name, part) for name, part in module.named_modules() if isinstance(part, BaseTunerLayer)]
    for name, part in layers:
        if type(part.get_base_layer()).__name__ in LAYERS:
            raise PEFTError(
                f"{name} is quantized, and merging would round it again. Export the adapter, load the base without "
                "quantize= and merge there."
            )
    _part(module, [part.get_base_layer() for _, part in layers])
    for name, part in layers:
        part.merge(safe_merge=True)
        place(module, name, part.get_base_layer())
    for name, part in [(name, part) for name, part in module.named_modules() if isinstance(part, ModulesToSaveWrapper)]:
        place(module, name, part.modules_to_save[part.active_adapter])
    remove_intrinsic(module)
    say_what_is_tied(module)
    for part in module.modules():
        for mark in ("peft_config", "eke_peft"):
            vars(part).pop(mark, None)
        if isinstance(part, nn.TransformerEncoderLayer):
            open_fast_path(part)
    return module


def _part(module: nn.Module, layers: list[nn.Module]) -> None:
    """Give each of these layers whose weight is another's too a weight of its own: what is added to one is not added
    to the other. A head that is tied to the embedding is so no longer."""
    holders: dict[int, set[int]] = {}
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            holders.setdefault(id(parameter), set()).add(id(part))
    for layer in layers:
        for name, parameter in list(layer.named_parameters(recurse=False)):
            if len(holders[id(parameter)]) > 1:
                setattr(layer, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
                holders[id(parameter)].discard(id(layer))


def say_what_is_tied(module: nn.Module) -> None:
    """Where a Hugging Face model's head is no longer its embedding, let its configuration say so: else loading or
    resizing would tie them again."""
    for part in module.modules():
        config = getattr(part, "config", None)
        if not getattr(config, "tie_word_embeddings", False) or not hasattr(part, "get_output_embeddings"):
            continue
        ends = part.get_input_embeddings(), part.get_output_embeddings()
        if None not in ends and getattr(ends[0], "weight", None) is not getattr(ends[1], "weight", None):
            config.tie_word_embeddings = False
