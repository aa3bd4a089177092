"""Which patches are hidden: at random one by one, in squares, or in rectangles."""

from __future__ import annotations

from math import ceil, exp, log, sqrt

import torch
from torch import Tensor


def random_units(batch: int, grid: tuple[int, int], share: float, unit: int, numbers: torch.Generator) -> Tensor:
    """Hide squares of ``unit`` by ``unit`` patches, for each image anew: (batch, patches), bool, True where hidden.

    Of the squares, ``share`` rounded up are hidden, as SimMIM's code has it. Squares that the grid cuts off at its edge
    count as whole ones.

    Args:
        batch: Images.
        grid: Patches along height and width.
        share: Of the squares that are hidden.
        unit: Side of a square in patches.
        numbers: Where the draws come from; the mask is on its device.

    Source:
        Xie et al. 2022 (SimMIM), section 3.2, and the authors' ``MaskGenerator``.
    """
    rows, columns = (-(-side // unit) for side in grid)
    order = torch.rand(batch, rows * columns, generator=numbers, device=numbers.device).argsort(1)
    hidden = order < units_hidden(rows * columns, share)  # as many places as there are draws: it is a permutation
    squares = hidden.view(batch, rows, columns).repeat_interleave(unit, 1).repeat_interleave(unit, 2)
    return squares[:, : grid[0], : grid[1]].reshape(batch, -1)


def units_hidden(units: int, share: float) -> int:
    """``share * units`` rounded up; a product that is whole but for rounding of floats is not rounded."""
    return ceil(round(units * share, 9))


def blockwise(grid: tuple[int, int], count: int, numbers: torch.Generator, smallest: int = 16) -> Tensor:
    """Hide rectangles until ``count`` patches of one image are hidden: (patches,), bool, True where hidden.

    The area of each is uniform between ``smallest`` and what is left to hide, whichever is more, its aspect log-uniform
    between 0.3 and 1 / 0.3, and it is less high and less wide than the grid. One that would hide more than is left is
    drawn again; where ten tries place none, it ends with fewer, but with one at least.

    Source:
        Bao et al. 2022 (BEiT), algorithm 1, and the authors' ``MaskingGenerator``, on the CPU.
    """
    rows, columns = grid
    hidden = torch.zeros(rows, columns, dtype=torch.bool)
    while (left := count - int(hidden.sum())) > 0:
        for _ in range(10):
            draw = torch.rand(4, generator=numbers).tolist()
            area = smallest + draw[0] * (left - smallest)
            aspect = exp(log(0.3) + draw[1] * (log(1 / 0.3) - log(0.3)))
            height, width = round(sqrt(area * aspect)), round(sqrt(area / aspect))
            if not (0 < height < max(rows, 2) and 0 < width < max(columns, 2)):
                continue
            top, start = int(draw[2] * (rows - height + 1)), int(draw[3] * (columns - width + 1))
            block = hidden[top : top + height, start : start + width]
            if 0 < block.numel() - int(block.sum()) <= left:
                block.fill_(True)
                break
        else:
            break
    if not hidden.any():  # a loss over nothing is NaN
        hidden.view(-1)[int(torch.randint(hidden.numel(), (), generator=numbers))] = True
    return hidden.flatten()
