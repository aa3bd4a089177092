"""Intrinsic dimension. Source: Aghajanyan, Zettlemoyer, Gupta, "Intrinsic Dimensionality Explains the Effectiveness of
Language Model Fine-Tuning", ACL 2021, https://arxiv.org/abs/2012.13255, section 3, by the Fastfood transform.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from eke.seams.names import at
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from eke_peft.errors import PEFTError


class Fastfood(nn.Module):
    """Adds to a weight a random linear map of a few numbers, H G P H B z, structured so that it is never stored whole.

    Each number moves a weight along a direction of length 1, however large the weight is.

    Args:
        numbers: The numbers, shared by all weights.
        shape: Of the weight.
        seed: Of the map.

    Source:
        Aghajanyan et al. 2020, section 3, and ``fastfood_torched`` of https://github.com/rabeehk/compacter, which
        divides by ``sqrt(LL sum(G^2)) sqrt(DD / LL)``. There one transform has the size of the weight; here it has that
        of the numbers and is drawn anew for each part of the weight.
    """

    def __init__(self, numbers: nn.Parameter, shape: torch.Size, seed: int) -> None:
        super().__init__()
        self.numbers, self.shape = numbers, shape
        self.size = 2 ** math.ceil(math.log2(max(numbers.numel(), 2)))
        self.parts = math.ceil(shape.numel() / self.size)
        draw = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (self.parts, self.size), generator=draw) * 2 - 1
        gauss = torch.randn(self.parts, self.size, generator=draw)
        order = torch.stack([torch.randperm(self.size, generator=draw) for _ in range(self.parts)])
        self.register_buffer("signs", signs.to(torch.int8), persistent=False)
        self.register_buffer("gauss", gauss, persistent=False)
        self.register_buffer("order", order, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        padded = F.pad(self.numbers.float(), (0, self.size - self.numbers.numel()))
        mixed = walsh_hadamard(padded * self.signs)
        mixed = walsh_hadamard(mixed.gather(1, self.order) * self.gauss)
        mixed = mixed / (self.gauss.norm(dim=1, keepdim=True) * math.sqrt(self.size))  # each part of length 1
        mixed = mixed / math.sqrt(weight.numel() / self.size)
        return weight + mixed.flatten()[: weight.numel()].view(self.shape).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


def walsh_hadamard(rows: Tensor) -> Tensor:
    """The Walsh-Hadamard transform of each row, (n, 2^k), without its factor."""
    size, step = rows.shape[1], 1
    while step < size:
        pairs = rows.view(len(rows), size // (2 * step), 2, step)
        rows = torch.cat([pairs[:, :, :1] + pairs[:, :, 1:], pairs[:, :, :1] - pairs[:, :, 1:]], dim=2).reshape(
            -1, size
        )
        step *= 2
    return rows


def weights_of(host: nn.Module, names: Iterable[str]) -> list[nn.Parameter]:
    """The weights of layers.

    Raises:
        PEFTError: a layer that has several.
    """
    layers = {name: at(host, name) for name in names}
    for name, layer in layers.items():
        if isinstance(layer, nn.MultiheadAttention):
            raise PEFTError(
                f"{name!r} is an nn.MultiheadAttention, whose weights are several. Name other targets=[...]."
            )
    return [layer.weight for layer in layers.values()]


def put_intrinsic(host: nn.Module, parameters: Iterable[nn.Parameter], dimension: int, seed: int) -> None:
    """Let all these parameters move together along a few random directions.

    Args:
        host: Holds them. One that several modules share moves in all of them. What lies in a LightningModule itself
            stays: parametrizing it would exchange the user's class.
        parameters: Those of them that are floating-point.
        dimension: How many directions.
        seed: Of them.
    """
    numbers = nn.Parameter(torch.zeros(dimension))
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for part in host.modules():
        for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append((part, name))
    for place, parameter in enumerate(dict.fromkeys(parameters)):
        held = owners.get(id(parameter), [])
        if not parameter.is_floating_point() or any(isinstance(part, LightningModule) for part, _ in held):
            continue
        for part, name in held:
            parametrize.register_parametrization(part, name, Fastfood(numbers, parameter.shape, seed + place))


def remove_intrinsic(host: nn.Module) -> None:
    """Leave each parameter where it has moved to."""
    moved: set[int] = set()
    for part in list(host.modules()):
        if not parametrize.is_parametrized(part):
            continue
        for name, one in list(part.parametrizations.items()):
            if isinstance(one[0], Fastfood):  # of a parameter that several share, the first owner leaves it moved
                original = one.original
                parametrize.remove_parametrizations(part, name, leave_parametrized=id(original) not in moved)
                moved.add(id(original))
