"""Which layers a method acts on, where nobody names any, and what the names that are given mean."""

from __future__ import annotations

import re

from eke.seams.anatomy import Anatomy, AnatomyError, anatomy
from eke.seams.blocks import BlocksError, find_all_blocks
from eke.seams.layers import LINEAR
from eke.seams.linear import linear_maps
from eke.seams.names import match, plain
from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.conv import _ConvNd

from eke_peft.errors import PEFTError

ALL = "all-linear"  # peft's word
_MAMBA, _PASSED_BY = re.compile("mamba|falcon_h1|nemotron_h"), ("out_proj", "conv1d")


def named(host: nn.Module, targets: list[str], paths: str | list[str] | None = None) -> list[str]:
    """The layers that patterns meet, of those that a method could act on; with ``["all-linear"]`` those of
    :func:`linear_layers`.

    Raises:
        NamesError: a pattern that meets none.
    """
    return linear_layers(host, paths) if list(targets) == [ALL] else match(_layers(host, ""), targets, "targets")


def usual_layers(host: nn.Module, config: PeftConfig, paths: str | list[str] | None = None) -> list[str]:
    """Names of the layers that peft itself takes for a method in this architecture, such as queries and values; where
    it knows none, the linear layers inside the repeated blocks.

    Raises:
        PEFTError: the blocks are not to be found, or hold none.
    """
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    known = getattr(tuner, "target_module_mapping", None) or {}
    usual = known.get(getattr(getattr(host, "config", None), "model_type", None))
    if not usual:
        return linear_layers(host, paths)
    names = [plain(name) for name in _layers(host, "")]
    if isinstance(usual, str):
        found = [name for name in names if re.fullmatch(usual, name)]
    else:
        found = [name for name in names if any(f".{name}".endswith(f".{one}") for one in usual)]
    if paths is not None:
        inside = tuple(f"{plain(path)}." for path in _blocks(host, paths))
        found = [name for name in found if name.startswith(inside)]
    return found or linear_layers(host, paths)  # other names, in another version of transformers


def _layers(part: nn.Module, path: str) -> list[str]:
    kinds = (nn.Linear, nn.Embedding, _ConvNd, nn.MultiheadAttention, BaseTunerLayer)
    if isinstance(part, kinds) or type(part).__name__ in LINEAR:
        return [path]
    inner = [(f"{path}.{child}" if path else child, one) for child, one in part.named_children()]
    return [name for below, one in inner for name in _layers(one, below)]


def linear_layers(host: nn.Module, paths: str | list[str] | None = None) -> list[str]:
    """Names of the linear layers inside the repeated blocks, of an encoder and a decoder alike, but for those inside of
    ``nn.MultiheadAttention``, and those of Mamba whose weights its kernels take: nobody calls them.

    Raises:
        PEFTError: the blocks are not to be found, or hold none.
    """
    mamba = _MAMBA.search(getattr(getattr(host, "config", None), "model_type", None) or "")
    found = {path: linear_maps(block) for path, block in _blocks(host, paths).items()}
    names = [
        f"{path}.{one.path}" if one.path else path
        for path, maps in found.items()
        for one in maps
        if type(one.module).__name__ in LINEAR and not (mamba and one.path.endswith(_PASSED_BY))
    ]
    if not names:
        raise PEFTError(f"the blocks, {next(iter(found))!r} and on, hold no linear layers. Name targets=[...].")
    return names


def outputs(host: nn.Module, paths: str | list[str] | None = None, attention: bool = True) -> list[str]:
    """Names of the layers that end a block's MLP, and its attention: what they give is added to the residual stream."""
    names = []
    for path, found in _read(host, paths).items():
        ends = [end for branch in found.branches for end in branch.ends if branch.kind == "mlp"]
        if not ends or not all(end.is_layer for end in ends):
            raise PEFTError(f"the block {path!r} has no projection that ends its MLP. Name targets=[...].")
        own = [end.path for end in ends]
        if attention:
            if not found.attention or any(site.output is None for site in found.attention):
                raise PEFTError(f"the block {path!r} has no projection that ends its attention. Name targets=[...].")
            own = [site.output.path if site.output.is_layer else site.path for site in found.attention] + own
        names += [f"{path}.{name}" for name in own]
    return names


def scaled(host: nn.Module, paths: str | list[str] | None = None) -> tuple[list[str], list[str]]:
    """What IA3 scales: keys, values, and the input of the layer that ends the MLP."""
    names, ends = [], outputs(host, paths, attention=False)
    for path, found in _read(host, paths).items():
        if not found.attention or not all(site.key.is_layer for site in found.attention):
            raise PEFTError(
                f"the attention at {path!r} has no key and value projections of its own, which IA3 scales. Name "
                "targets=[...] and settings={'feedforward_modules': [...]}."
            )
        for site in found.attention:
            names += dict.fromkeys(f"{path}.{one.path}" for one in (site.key, site.value))
    return names + ends, ends


def _blocks(host: nn.Module, paths: str | list[str] | None) -> dict[str, nn.Module]:
    try:
        lists = find_all_blocks(host, paths)
    except BlocksError as error:
        raise PEFTError(f"{error} Or name the layers: targets=[...].") from None
    return {blocks.path_of(number): block for blocks in lists for number, block in enumerate(blocks)}


def _read(host: nn.Module, paths: str | list[str] | None) -> dict[str, Anatomy]:
    found = {}
    for path, block in _blocks(host, paths).items():
        try:
            found[path] = anatomy(block)
        except AnatomyError as error:
            raise PEFTError(f"the block {path!r}: {error} Or name the layers: targets=[...].") from None
    return found
