"""Which layers a method acts on, where nobody names any, and what the names that are given mean."""

from __future__ import annotations

from eke.seams.anatomy import Anatomy, AnatomyError, anatomy
from eke.seams.blocks import BlocksError, find_all_blocks
from eke.seams.layers import LINEAR
from eke.seams.linear import linear_maps
from eke.seams.names import match
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.conv import _ConvNd

from eke_peft.errors import PEFTError


def named(host: nn.Module, targets: list[str]) -> list[str]:
    """The layers that patterns meet, of those that a method could act on.

    Raises:
        NamesError: a pattern that meets none.
    """
    return match(_layers(host, ""), targets, "targets")


def _layers(part: nn.Module, path: str) -> list[str]:
    kinds = (nn.Linear, nn.Embedding, _ConvNd, nn.MultiheadAttention, BaseTunerLayer)
    if isinstance(part, kinds) or type(part).__name__ in LINEAR:
        return [path]
    inner = [(f"{path}.{child}" if path else child, one) for child, one in part.named_children()]
    return [name for below, one in inner for name in _layers(one, below)]


def linear_layers(host: nn.Module, paths: str | list[str] | None = None) -> list[str]:
    """Names of the linear layers inside the repeated blocks, of an encoder and a decoder alike, but for those inside of
    ``nn.MultiheadAttention``, which computes with their weights alone.

    Raises:
        PEFTError: the blocks are not to be found, or hold none.
    """
    found = {path: linear_maps(block) for path, block in _blocks(host, paths).items()}
    names = [
        f"{path}.{one.path}" if one.path else path
        for path, maps in found.items()
        for one in maps
        if type(one.module).__name__ in LINEAR
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
