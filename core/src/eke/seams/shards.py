"""Tensors of which each process may hold a part: the part, the whole, and parts in checkpoints.

The tricks it hides: a ``DTensor`` in a checkpoint that one process writes would keep that process's part alone, without
a word; and a strategy that saves sharded writes the tensors of ``checkpoint["state_dict"]`` part by part, and from
everything else what the first process holds. So parts of a technique travel there, under names that no model has.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as sharded_files
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

PREFIX = "eke/"


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it, unless it is sharded. Writing to it writes to the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process. Of a sharded one each process has to ask."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.to(tensor.device_mesh.device_type).full_tensor()  # cards cannot send CPU memory


def laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, laid out as another one is: on its device, divided as it is."""
    if isinstance(like, DTensor) and not isinstance(tensor, DTensor):
        moved = tensor.to(like.device)
        return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)
    return tensor.to(like.device)


def plain_name(name: str) -> str:
    """The name that a tensor has without ``torch.compile`` around the modules that hold it."""
    return name.replace("_orig_mod.", "")


def reshard(module: nn.Module) -> None:
    """Let FSDP2 put away what it has gathered: after a pass without backward, as in validation, the module's parameters
    are gathered copies, and not those that train."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter by every one of its names: a tied one comes several times."""
    reshard(module)
    return {plain_name(name): one for name, one in module.named_parameters(remove_duplicate=False)}


def nearest(name: str, names: Iterable[str]) -> str:
    """The names that look most like one that was not found, for an error: ``"'a.weight', 'b.weight'"``."""
    names = list(names)
    near = difflib.get_close_matches(name, names, 3, 0.5) or names[:3]
    return ", ".join(map(repr, near)) or "none"


def is_sharded(tensors: Iterable[Any]) -> bool:
    """Whether each process holds a part of one of them."""
    return any(isinstance(one, DTensor) for one in tensors)


def save_parts(checkpoint: dict[str, Any], key: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Put tensors into a checkpoint that is about to be saved, each process its parts. Every process has to call it.

    Args:
        checkpoint: As ``on_save_checkpoint`` gets it.
        key: Whose they are, such as ``"average/ema"``.
        tensors: Name to tensor.

    Returns:
        What goes into the technique's own state, for :func:`load_parts`: where the checkpoint is one file the tensors,
        whole and in CPU memory; where it is sharded their names, and the tensors lie with the model's.
    """
    if not is_sharded(checkpoint["state_dict"].values()):
        return {"tensors": {name: whole(one).detach().to("cpu", copy=True) for name, one in tensors.items()}}
    checkpoint["state_dict"] = {
        **checkpoint["state_dict"],
        **{f"{PREFIX}{key}/{name}": one.detach() for name, one in tensors.items()},
    }
    return {"sharded": {name: str(one.dtype).removeprefix("torch.") for name, one in tensors.items()}, "key": key}


def load_parts(
    saved: Mapping[str, Any], like: Mapping[str, Tensor], path: str | Path | None = None
) -> dict[str, Tensor]:
    """What :func:`save_parts` put away, as copies laid out as other tensors are. Every process has to call it.

    Args:
        saved: What :func:`save_parts` returned.
        like: Each name to a tensor of the same shape, such as the model's weights once they are sharded.
        path: Folder of the checkpoint, where it was saved sharded: ``trainer.ckpt_path``.
    """
    if "tensors" in saved:
        return {name: laid_out(one.clone(), like[name]) for name, one in saved["tensors"].items()}
    key = saved["key"]
    parts = {
        f"{PREFIX}{key}/{name}": torch.empty_like(like[name], dtype=getattr(torch, dtype), requires_grad=False)
        for name, dtype in saved["sharded"].items()
    }
    sharded_files.load({"state_dict": parts}, checkpoint_id=path)
    return {name: parts[f"{PREFIX}{key}/{name}"] for name in saved["sharded"]}
