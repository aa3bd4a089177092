"""Intrinsic dimension. Source: Aghajanyan, Zettlemoyer, Gupta, "Intrinsic Dimensionality Explains the Effectiveness of
Language Model Fine-Tuning", ACL 2021, https://arxiv.org/abs/2012.13255, section 3, by the Fastfood transform.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from eke_peft.errors import PEFTError


class Fastfood(nn.Module):
    """Adds to a weight a random linear map of a few numbers, H G P H B z, structured so that it is never stored whole.

    Args:
        numbers: The numbers, shared by all weights.
        shape: Of the weight.
        seed: Of the map.
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
        mixed = mixed / (self.gauss.norm(dim=1, keepdim=True) * math.sqrt(self.size))
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


def put_intrinsic(host: nn.Module, names: Iterable[str], dimension: int, seed: int) -> None:
    """Let all these weights move together along a few random directions."""
    numbers = nn.Parameter(torch.zeros(dimension))
    for place, name in enumerate(names):
        layer = host.get_submodule(name)
        if isinstance(layer, nn.MultiheadAttention):
            raise PEFTError(
                f"{name!r} is an nn.MultiheadAttention, whose weights are several. Name other targets=[...]."
            )
        parametrize.register_parametrization(layer, "weight", Fastfood(numbers, layer.weight.shape, seed + place))


def remove_intrinsic(host: nn.Module) -> None:
    """Leave each weight where it has moved to."""
    for part in list(host.modules()):
        if parametrize.is_parametrized(part, "weight") and isinstance(part.parametrizations.weight[0], Fastfood):
            parametrize.remove_parametrizations(part, "weight", leave_parametrized=True)
