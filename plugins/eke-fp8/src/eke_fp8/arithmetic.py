"""The arithmetic of FP8, in software: formats, scales, and matrix products of rounded numbers.

Values are those of the hardware; only what is stored in between stays in the precision it came in, so neither memory
nor time is saved.

Sources: Micikevicius and others, "FP8 Formats for Deep Learning", 2022, https://arxiv.org/abs/2209.05433 (formats);
Rouhani and others, "Microscaling Data Formats for Deep Learning", 2023, https://arxiv.org/abs/2310.10537 (groups of
32); Cambier and others, "Shifted and Squeezed 8-bit Floating Point Format", ICLR 2020,
https://arxiv.org/abs/2001.05674; Wang, Choi, Brand, Chen, Gopalakrishnan, "Training Deep Neural Networks with 8-bit
Floating Point Numbers", NeurIPS 2018, https://arxiv.org/abs/1812.08011. Survey section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_TINY = 1e-12  # no scale is larger than for this, and one of zeros is finite
_MINIFLOATS = {E4M3: (3, -6), E5M2: (2, -14)}  # bits of the mantissa, exponent of the smallest normal number
LOSS_SCALE = 1000.0  # Wang et al. 2018, section 4
ROLES = ("input", "weight", "gradient")


def round_to(x: Tensor, mantissa: int, lowest: int, uniform: Tensor | None = None) -> Tensor:
    """Round to a binary floating-point format without upper end: to the nearest, ties to even, or stochastically.

    Args:
        x: float32.
        mantissa: Bits after the leading one.
        lowest: Exponent of the smallest normal number; below it numbers have equal distances.
        uniform: In [0, 1), of the shape of ``x``: the chance of the upper neighbour is the distance from the lower one.

    Returns:
        float32.
    """
    exponent = torch.frexp(x).exponent - 1
    step = torch.ldexp(torch.ones_like(x), exponent.clamp(min=lowest) - mantissa)
    steps = x / step
    steps = torch.round(steps) if uniform is None else torch.floor(steps + uniform)
    return torch.where(x.isfinite(), steps * step, x)


def to_float8(x: Tensor, dtype: torch.dtype, uniform: Tensor | None = None) -> Tensor:
    """Round to a float8 format and saturate at its largest number.

    Args:
        x: Any floating-point tensor.
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        uniform: As for :func:`round_to`.

    Returns:
        ``dtype``. NaN stays NaN.
    """
    largest = torch.finfo(dtype).max
    x = x.float()
    if uniform is not None:
        x = round_to(x, *_MINIFLOATS[dtype], uniform)
    return x.clamp(-largest, largest).to(dtype)  # clamped first: the cast to e5m2 gives infinity, and older ones NaN


def shift_and_squeeze(x: Tensor) -> Tensor:
    """S2FP8: numbers that went through E5M2 after their logarithms were moved to a mean of 0 and a maximum of 15.

    Zeros stay zero. Where all others are equal in size they are 2 ** 15 in between.

    Args:
        x: Any floating-point tensor.

    Returns:
        float32.

    Source:
        Cambier et al. 2020, equations 2 to 5.
    """
    x = x.float()
    logs = x.abs().log2()
    there = (x != 0) & x.isfinite()
    if not there.any():
        return x
    mean, top = logs[there].double().mean(), logs[there].max().double()
    alpha = torch.where(top > mean, 15 / (top - mean), 1.0).float()
    beta = torch.where(top > mean, -alpha * mean, 15 - top).float()
    squeezed = to_float8(torch.exp2(beta + alpha * logs), E5M2).float()
    return (x.sign() * torch.exp2((squeezed.log2() - beta) / alpha)).where(there, x)


def chunked_product(a: Tensor, b: Tensor, chunk: int = 64) -> Tensor:
    """Matrix product summed in a 16-bit format (1 sign, 6 exponent, 9 mantissa bits), by chunks.

    The sum of each chunk is rounded, and so is every sum of chunks. Inside of a chunk sums are float32's, which
    departs from the paper, where they are rounded too: for that each product would need a step of its own.

    Args:
        a, b: (rows, depth) and (depth, columns), float32.
        chunk: Products of a chunk.

    Returns:
        (rows, columns), float32.

    Source:
        Wang et al. 2018, section 2.3.
    """
    total = a.new_zeros(a.shape[0], b.shape[1])
    for rows, columns in zip(a.split(chunk, 1), b.split(chunk, 0), strict=True):
        total = round_to(total + round_to(rows @ columns, 9, -30), 9, -30)
    return total


# ---------------------------------------------------------------------- scales


def scale_for(amax: Tensor, dtype: torch.dtype, power_of_two: bool = False) -> Tensor:
    """By what numbers of at most ``amax`` are multiplied to fill a format; if a power of two, the one below."""
    scale = (torch.finfo(dtype).max / amax.double().clamp(min=_TINY)).float()
    return torch.exp2(torch.floor(torch.log2(scale))) if power_of_two else scale


def tensorwise(x: Tensor, along: int, role: str, dtype: torch.dtype) -> Tensor:
    return scale_for(x.abs().amax(), dtype)


def rowwise(x: Tensor, along: int, role: str, dtype: torch.dtype) -> Tensor:
    return scale_for(x.abs().amax(along, keepdim=True), dtype, power_of_two=True)


def groups_of_32(x: Tensor, along: int, role: str, dtype: torch.dtype) -> Tensor:
    return scale_for(_largest(x, 1 if along else 32, 32 if along else 1), dtype, power_of_two=True)


def blocks_of_128(x: Tensor, along: int, role: str, dtype: torch.dtype) -> Tensor:
    square = role == "weight"
    rows, columns = 1 if along and not square else 128, 128 if along or square else 1
    return scale_for(_largest(x, rows, columns), dtype, power_of_two=True)


def _largest(x: Tensor, rows: int, columns: int) -> Tensor:
    """Largest size in each block of a matrix, spread over the block again."""
    height, width = x.shape
    padded = nn.functional.pad(x.abs(), (0, -width % columns, 0, -height % rows))
    tiles = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    spread = tiles.amax((1, 3), keepdim=True).expand_as(tiles).reshape(padded.shape)
    return spread[:height, :width]


class Recipe(NamedTuple):
    """How the operands of the three products of a linear layer are rounded."""

    forward: torch.dtype
    backward: torch.dtype
    scale: Callable[[Tensor, int, str, torch.dtype], Tensor] | None
    rounded_weight_gradient: bool = True


RECIPES = {
    "tensorwise": Recipe(E4M3, E5M2, tensorwise),
    "rowwise": Recipe(E4M3, E4M3, rowwise),
    "rowwise_with_gw_hp": Recipe(E4M3, E4M3, rowwise, rounded_weight_gradient=False),
    "delayed": Recipe(E4M3, E5M2, None),
    "block": Recipe(E4M3, E4M3, blocks_of_128),
    "mx": Recipe(E4M3, E4M3, groups_of_32),
    "s2fp8": Recipe(E5M2, E5M2, None),
    "chunked": Recipe(E5M2, E5M2, None),
}


@dataclass
class Arithmetic:
    """What one layer computes with, and what it remembers.

    Args:
        recipe: Of :data:`RECIPES`.
        generator: Of stochastic rounding of gradients, on the CPU; None rounds to the nearest.
        history: Largest sizes that delayed scaling looks back on.
        margin: Powers of two that delayed scaling leaves free.
    """

    recipe: str
    generator: torch.Generator | None = None
    history: int = 1024
    margin: int = 0
    seen: Tensor = field(default_factory=lambda: torch.zeros(3))  # largest sizes since the last update, by role
    past: Tensor | None = None  # (history, 3), the latest first
    scales: Tensor = field(default_factory=lambda: torch.ones(3))

    def operand(self, x: Tensor, role: str, along: int, notes: bool) -> Tensor:
        """A matrix as the product sees it, float32. ``along`` is the dimension that is summed over."""
        recipe = RECIPES[self.recipe]
        dtype = recipe.backward if role == "gradient" else recipe.forward
        if self.recipe == "s2fp8":
            return shift_and_squeeze(x)
        x = x.float()
        if self.recipe == "chunked":
            scale = x.new_tensor(LOSS_SCALE if role == "gradient" else 1.0)
        elif self.recipe == "delayed":
            scale = self._delayed(x, ROLES.index(role), notes)
        elif self.recipe == "rowwise_with_gw_hp" and role == "weight" and along == 0:
            scale = scale_for(x.abs().amax(), dtype, power_of_two=True)
        else:
            scale = recipe.scale(x, along, role, dtype)
        uniform = None
        if self.generator is not None and role == "gradient":
            uniform = torch.rand(x.shape, generator=self.generator).to(x.device)
        return to_float8(x * scale, dtype, uniform).float() / scale

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        if self.recipe == "chunked":
            return chunked_product(a, b)
        return shift_and_squeeze(a @ b) if self.recipe == "s2fp8" else a @ b

    def _delayed(self, x: Tensor, role: int, notes: bool) -> Tensor:
        if self.scales.device != x.device:
            self.scales, self.seen = self.scales.to(x.device), self.seen.to(x.device)
        if notes:
            self.seen[role] = torch.maximum(self.seen[role], x.abs().amax())
        return self.scales[role]

    def update(self, seen: Tensor) -> None:
        """Delayed scaling: take the largest sizes of a step, (3,), into the history and follow it.

        While a size in the history is infinite or NaN, the scale stays what it was.

        Source:
            Transformer Engine, ``delayed_scaling.cu``.
        """
        if self.past is None:
            self.past = seen.new_zeros(self.history, 3)
        self.past = torch.cat([seen[None], self.past[:-1].to(seen)])
        largest, recipe = self.past.amax(0), RECIPES[self.recipe]
        formats = (recipe.forward, recipe.forward, recipe.backward)
        found = torch.stack([scale_for(one, dtype) for one, dtype in zip(largest, formats, strict=True)])
        self.scales = torch.where((largest > 0) & largest.isfinite(), found / 2**self.margin, self.scales.to(seen))
        self.seen = torch.zeros_like(seen)

    def state_dict(self) -> dict[str, Any]:
        return {"past": self.past, "scales": self.scales, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.past, self.scales, self.seen = state["past"], state["scales"], state["seen"]


class EmulatedLinear(nn.Linear):
    """A linear layer whose three products see rounded operands. An ``nn.Linear`` becomes one by its class."""

    eke_fp8: Arithmetic

    @torch.compiler.disable  # rounding goes over float64 and generators, and time is no aim here
    def forward(self, input: Tensor) -> Tensor:
        return _emulated(self, input, self.weight)


class EmulatedConv1D(nn.Module):
    """The same of Hugging Face's ``Conv1D``, whose weight is (inputs, outputs)."""

    eke_fp8: Arithmetic

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return _emulated(self, x, self.weight.t())


EMULATED = (EmulatedLinear, EmulatedConv1D)


def emulate(layer: nn.Module, arithmetic: Arithmetic) -> nn.Module:
    """Let a layer multiply so from now on: an ``nn.Linear``, or a ``Conv1D``. It stays the same object."""
    layer.__class__ = EmulatedLinear if isinstance(layer, nn.Linear) else EmulatedConv1D
    layer.eke_fp8 = arithmetic
    return layer


def _emulated(layer: nn.Module, input: Tensor, weight: Tensor) -> Tensor:
    if torch.is_autocast_enabled(input.device.type):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight = input.to(dtype), weight.to(dtype)
    with torch.autocast(input.device.type, enabled=False):
        output = _Linear.apply(input, weight, layer.eke_fp8, layer.training)
    return output if layer.bias is None else output + layer.bias.to(output.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, arithmetic: Arithmetic, training: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.arithmetic, ctx.training = arithmetic, training
        rows = arithmetic.operand(x.flatten(0, -2), "input", 1, training)
        product = arithmetic.product(rows, arithmetic.operand(weight, "weight", 1, training).T)
        return product.to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), arithmetic, training = ctx.saved_tensors, ctx.arithmetic, ctx.training
        flat, to_input, to_weight = gradient.flatten(0, -2), None, None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                rows = arithmetic.operand(flat, "gradient", 1, training)
                product = arithmetic.product(rows, arithmetic.operand(weight, "weight", 0, False))
                to_input = product.to(x.dtype).view_as(x)
            if ctx.needs_input_grad[1]:
                left, right = flat.float(), x.flatten(0, -2).float()
                if RECIPES[arithmetic.recipe].rounded_weight_gradient:
                    left = arithmetic.operand(flat, "gradient", 0, training)
                    right = arithmetic.operand(x.flatten(0, -2), "input", 0, False)
                to_weight = arithmetic.product(left.T, right).to(weight.dtype)
        return to_input, to_weight, None, None
