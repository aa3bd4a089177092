"""Progressive resolution and patch size: a Vision Transformer begins with few tokens and ends with all of them.

Sources: Beyer, Izmailov, Kolesnikov and others, "FlexiViT: One Model for All Patch Sizes", CVPR 2023,
https://arxiv.org/abs/2212.08013, section 3.4 (patch embeddings of other sizes); Tan and Le,
"EfficientNetV2", ICML 2021, https://arxiv.org/abs/2104.00298, section 4 (images that grow). Survey section 2.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
from eke import EkeError, Run, Technique, TechniqueCallback, in_run
from eke.seams import batch as batches
from eke.seams.patches import PatchEmbedding, PatchesError, find_images, find_patches, relative_positions
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F

from eke_resolution.entry import RECORD

_OWN = 16  # tokens in front of the patches that a position embedding may have rows for


class ResolutionError(EkeError, MisconfigurationException, ValueError):
    """An argument, a model or a run with which a model cannot begin with few tokens."""


def scale_at(progress: float, start: float, hold: float, tail: float) -> float:
    """Share of the full side when this share of the run is done: ``start`` until ``hold``, then up on a line to 1 at
    ``1 - tail``."""
    if progress >= 1 - tail:
        return 1.0
    if progress < hold:
        return start
    return start + (1 - start) * (progress - hold) / (1 - tail - hold)


def resize_positions(
    positions: Tensor,
    old: tuple[int, int],
    new: tuple[int, int],
    interpolation: Literal["bicubic", "linear"] = "bicubic",
) -> Tensor:
    """Position embeddings for another grid of patches, by interpolation with antialiasing, in float32.

    Args:
        positions: (rows, width) or (1, rows, width): some tokens of the model's own, then the patches row by row.
        old, new: Patches along height and width.
        interpolation: ``"bicubic"``, or ``"linear"`` along both sides, as FlexiViT's authors do.

    Returns:
        The same with other rows; rows of the model's own tokens as they are. Differentiable.
    """
    rows = positions.reshape(-1, positions.shape[-1])
    own = len(rows) - old[0] * old[1]
    grid = rows[own:].float().T.reshape(1, -1, *old)
    mode = "bilinear" if interpolation == "linear" else interpolation
    grid = F.interpolate(grid, size=new, mode=mode, antialias=True, align_corners=False)
    resized = torch.cat([rows[:own], grid.flatten(2)[0].T.to(rows.dtype)])
    return resized.reshape(*positions.shape[:-2], *resized.shape)


def resize_kernel(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """A patch embedding for patches of another size, (width, channels, height, width) with ``size`` at the end.

    The pseudoinverse of bilinear interpolation: a patch that is enlarged to ``size`` gives the same token as before, to
    the last digits; for smaller patches it is the closest there is.

    Source:
        Beyer et al. 2023, equation 4: ``(B^T)^+ w`` for the interpolation matrix B.
    """
    old = tuple(kernel.shape[2:])
    if old == tuple(size):
        return kernel
    inverse = _inverse(old, tuple(size)).to(kernel.device)
    flat = kernel.float().flatten(2)  # (width, channels, pixels)
    return (flat @ inverse.T).unflatten(2, size).to(kernel.dtype)


@lru_cache(maxsize=32)
def _inverse(old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """``(B^T)^+``, (new pixels, old pixels): one column for each pixel of the old kernel."""
    basis = torch.eye(old[0] * old[1], dtype=torch.float64).view(-1, 1, *old)
    enlarge = F.interpolate(basis, size=new, mode="bilinear", align_corners=False).flatten(1)  # B^T
    return torch.linalg.pinv(enlarge).float()


class Resolution(TechniqueCallback):
    """Train on small images first, or on large patches. Validation has the images and patches of the model.

    Example::

        trainer = Trainer(max_epochs=90, callbacks=[Resolution(start=0.5)])

    Args:
        start: Side of the grid of tokens at the first step, over the full one.
        hold: Share of the run that it stays there. Then it grows on a line.
        tail: Share of the run, at its end, with all tokens.
        mode: ``"images"`` are made smaller, by bilinear interpolation with antialiasing, to whole patches.
            ``"patches"`` are made larger, to sizes that divide the image, and their embedding with them.
        positions: Name of the position embedding, such as ``"vit.pos_embed"``. By default the one parameter outside
            the blocks that has a row for each patch. ``""`` for a model that takes images of any size by itself.
        blocks: Dotted path of the list of blocks. By default the one that sees images: of two towers, the image's.
        interpolation: Of position embeddings: ``"bicubic"``, as ViTs are commonly resized, or ``"linear"``, as
            FlexiViT's authors do.

    Raises:
        ValueError: shares outside their range; no patch embedding; relative positions; a batch without images.
        MisconfigurationException: a run of unknown length; no position embedding.
    """

    technique: ClassVar[Technique] = RECORD
    _embedding: PatchEmbedding | None = in_run(None)
    _full: tuple[int, int] = in_run((0, 0))  # grid of a whole image
    _grid: tuple[int, int] | None = in_run(None)  # of this batch, where it is another

    def __init__(
        self,
        start: float = 0.5,
        *,
        hold: float = 0.3,
        tail: float = 0.2,
        mode: Literal["images", "patches"] = "images",
        positions: str | None = None,
        blocks: str | None = None,
        interpolation: Literal["bicubic", "linear"] = "bicubic",
    ) -> None:
        if not 0 < start <= 1:
            raise ResolutionError(f"start={start}: give a share of the full side above 0, up to 1.")
        if hold < 0 or tail < 0 or hold + tail > 1:
            raise ResolutionError(f"hold={hold}, tail={tail}: give shares of the run that leave room for both.")
        if mode not in ("images", "patches"):
            raise ResolutionError(f"mode={mode!r} is none of: images, patches.")
        if interpolation not in ("bicubic", "linear"):
            raise ResolutionError(f"interpolation={interpolation!r} is none of: bicubic, linear.")
        self.start, self.hold, self.tail, self.mode = start, hold, tail, mode
        self.positions, self.blocks, self.interpolation = positions, blocks, interpolation

    def check(self, run: Run) -> None:
        if run.fitting:
            run.until(1.0)  # the schedule goes by the length of the run

    def alter_model(self, run: Run) -> None:
        pl_module = run.module
        if pairs := relative_positions(pl_module):
            raise PatchesError(
                f"{type(pl_module).__name__} has relative positions ({pairs[0]}) for one size of image. Resolution "
                "serves models that add position embeddings to their patches."
            )
        embedding = find_patches(pl_module, self.blocks)
        if embedding.stem:
            raise PatchesError(
                f"{type(pl_module).__name__} has further convolutions before its blocks ({', '.join(embedding.stem)}). "
                "Resolution serves models that cut images into patches by one."
            )
        self._embedding = embedding

    def around_step(self, run: Run, call_next: Any, batch: Any, *args: Any) -> Any:
        # Here, and not where batches are altered: whoever looks at the batch after the step finds it as it came.
        scale = scale_at(run.progress.share, self.start, self.hold, self.tail)
        self._grid = None
        if scale == 1:
            return call_next(batch, *args)
        images = find_images(batch, self._embedding.module.in_channels)
        self._full = self._embedding.grid(images)
        grid = tuple(
            max(1, round(count * scale)) if self.mode == "images" else _fewest(side, patch, count * scale)
            for count, side, patch in zip(self._full, images.shape[2:], self._embedding.patch, strict=True)
        )
        if grid == self._full:
            return call_next(batch, *args)
        self._grid = grid
        if self.mode == "images":
            size = tuple(count * patch for count, patch in zip(grid, self._embedding.patch, strict=True))
            wide = images if images.element_size() > 2 else images.float()  # no kernel for bfloat16 on a CPU
            small = F.interpolate(wide, size=size, mode="bilinear", antialias=True, align_corners=False)
            small = small.to(images.dtype)
            batch = batches.replaced(batch, images, small)
        with self._fitted():
            return call_next(batch, *args)

    def step_kind(self) -> str:
        return f"{self._grid[0]} by {self._grid[1]} patches" if self._grid else "all patches"

    @contextmanager
    def _fitted(self) -> Iterator[None]:
        """The model made for this grid: positions, and the patch embedding or the size that it expects."""
        conv = self._embedding.module
        changes: list[tuple[dict[str, Any], str, Any]] = []
        path = self._position_path()
        if path:
            owner, _, name = path.rpartition(".")
            holder = self.run.module.get_submodule(owner)
            resized = resize_positions(getattr(holder, name), self._full, self._grid, self.interpolation)
            changes += _stand_in(holder, name, resized)
            if isinstance(holder, nn.Embedding):  # looked up by a buffer of row numbers, beside it
                changes += _row_numbers(self.run.module.get_submodule(owner.rpartition(".")[0]), holder, len(resized))
        if self.mode == "patches":
            patch = tuple(
                patch * count // now
                for patch, count, now in zip(self._embedding.patch, self._full, self._grid, strict=True)
            )
            changes += _stand_in(conv, "weight", resize_kernel(conv.weight, patch))
            changes += [(vars(conv), "kernel_size", patch), (vars(conv), "stride", patch)]
        else:
            size = tuple(count * patch for count, patch in zip(self._grid, self._embedding.patch, strict=True))
            changes += _expected_sizes(self.run.module, self._embedding, self._full, size)
        changes += _expected_counts(self.run.module, self._embedding, self._full, self._grid)
        with _changed(changes):
            yield

    def _position_path(self) -> str:
        if self.positions is not None:
            return self.positions
        patches, width = self._full[0] * self._full[1], self._embedding.module.out_channels
        fitting: list[str] = []
        path = self._embedding.path
        while path and not fitting:  # from the convolution outwards: of two towers, each has its own
            path = path.rpartition(".")[0]
            around = self.run.module.get_submodule(path)
            prefix = f"{path}." if path else ""
            fitting = [
                prefix + name
                for name, tensor in (*around.named_parameters(), *around.named_buffers())
                if _is_of_positions(tensor, patches, width)
                and not isinstance(around.get_submodule(name.rpartition(".")[0]), nn.Linear)
            ]
        if len(fitting) != 1:
            name = type(self.run.module).__name__
            raise ResolutionError(
                f"{len(fitting)} parameters of {name} have a row for each of {patches} patches "
                f"of width {width}{': ' + ', '.join(fitting) if fitting else ''}. Name the position embedding, as "
                "Resolution(positions='vit.pos_embed'), or give positions='' if the model takes any size by itself."
            )
        return fitting[0]


def _is_of_positions(tensor: Tensor, patches: int, width: int) -> bool:
    """(rows, width) or (1, rows, width) with a row for each patch and a few more."""
    if tensor.ndim not in (2, 3) or tensor.shape[-1] != width or not tensor.is_floating_point():
        return False
    return 0 <= tensor.shape[-2] - patches <= _OWN and (tensor.ndim == 2 or tensor.shape[0] == 1)


def _fewest(side: int, patch: int, wanted: float) -> int:
    """The most patches along a side of pixels, up to ``wanted``, of whole pixels and without a rest; or all of them."""
    full = side // patch
    counts = [count for count in range(1, full + 1) if side % count == 0 and (patch * full) % count == 0]
    fitting = [count for count in counts if count <= wanted + 1e-6]
    return max(fitting) if fitting and full in counts else full


def _stand_in(module: nn.Module, name: str, tensor: Tensor) -> list[tuple[dict[str, Any], str, Any]]:
    """A tensor in place of a parameter or buffer: taken out of the module's table, and set as a plain attribute."""
    table = module._parameters if name in module._parameters else module._buffers
    return [(table, name, _GONE), (vars(module), name, tensor)]


_GONE = object()


@contextmanager
def _changed(changes: list[tuple[dict[str, Any], str, Any]]) -> Iterator[None]:
    """Entries of dictionaries set, or taken out, inside."""
    kept = [(table, name, table.get(name, _GONE)) for table, name, _ in changes]
    tables = {id(table): (table, dict(table)) for table, _, value in changes if value is _GONE}
    try:
        for table, name, value in changes:
            if value is _GONE:
                table.pop(name)
            else:
                table[name] = value
        yield
    finally:
        for table, name, value in kept:
            if value is _GONE:
                table.pop(name)
        for table, before in tables.values():
            table.clear()  # not put back singly: optimizers' states go by the order of parameters
            table.update(before)
        for table, name, value in kept:
            if value is not _GONE and id(table) not in tables:
                table[name] = value


def _row_numbers(around: nn.Module, positions: nn.Embedding, rows: int) -> list[tuple[dict[str, Any], str, Any]]:
    """Buffers beside an embedding that number all of its rows."""
    return [
        change
        for name, buffer in around.named_buffers(recurse=False)
        if not buffer.is_floating_point() and buffer.shape[-1:] == (positions.num_embeddings,)
        for change in _stand_in(around, name, torch.arange(rows, device=buffer.device).expand(*buffer.shape[:-1], -1))
    ]


def _around(module: nn.Module, embedding: PatchEmbedding) -> list[nn.Module]:
    """The module that cuts patches, and those around it."""
    parts = embedding.path.split(".")
    return [module.get_submodule(".".join(parts[:depth])) for depth in range(1, len(parts))]


def _expected_sizes(
    module: nn.Module, embedding: PatchEmbedding, full: tuple[int, int], size: tuple[int, int]
) -> list[tuple[dict[str, Any], str, Any]]:
    """Sizes that the modules around the convolution expect of an image, and would refuse another."""
    old = tuple(count * patch for count, patch in zip(full, embedding.patch, strict=True))
    changes = []
    for owner in _around(module, embedding):
        for name in ("image_size", "img_size"):
            expected = vars(owner).get(name)
            if isinstance(expected, (tuple, list)) and tuple(expected) == old:
                changes.append((vars(owner), name, size))
            elif isinstance(expected, int) and (expected, expected) == old and size[0] == size[1]:
                changes.append((vars(owner), name, size[0]))
    return changes


def _expected_counts(
    module: nn.Module, embedding: PatchEmbedding, full: tuple[int, int], grid: tuple[int, int]
) -> list[tuple[dict[str, Any], str, Any]]:
    """Grids and numbers of patches that those modules keep."""
    changes = []
    for owner in _around(module, embedding):
        for name, old, new in (
            ("grid_size", full, grid),
            ("num_patches", full[0] * full[1], grid[0] * grid[1]),
        ):
            if vars(owner).get(name) == old:
                changes.append((vars(owner), name, new))
    return changes
