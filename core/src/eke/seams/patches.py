"""Where a model turns images into tokens: its patch embedding, its class token and its position embeddings.

The trick it hides: libraries name these parts differently, but each cuts an image by one convolution whose stride is
its kernel, puts a few tokens of its own in front, and adds a parameter with one row a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from eke.seams import batch as batches
from eke.seams.blocks import Blocks, BlocksError, find_all_blocks, find_blocks
from eke.spec import EkeError


class PatchesError(EkeError, ValueError):
    """The patch embedding of a model is not to be found, or it is none that the technique can serve."""


@dataclass(frozen=True)
class PatchEmbedding:
    """The convolution that cuts images into patches.

    Attributes:
        path: Dotted path of it in the module that was searched.
        module: The convolution.
        stem: Other convolutions that are not in the blocks either. With some, a token has seen more than its patch.
    """

    path: str
    module: _ConvNd
    stem: tuple[str, ...] = ()

    @property
    def patch(self) -> tuple[int, ...]:
        """Height and width of a patch in pixels."""
        return tuple(self.module.kernel_size)

    def grid(self, images: Tensor) -> tuple[int, ...]:
        """Patches along each side of images, (batch, channels, height, width)."""
        return tuple(
            (size - kernel) // stride + 1
            for size, kernel, stride in zip(images.shape[2:], self.module.kernel_size, self.module.stride, strict=True)
        )


def find_patches(module: nn.Module, blocks: str | None = None) -> PatchEmbedding:
    """Find the convolution that cuts images into patches: its stride is its kernel, and it is in none of the blocks.

    Args:
        module: A model, a LightningModule, or anything that holds one.
        blocks: Dotted path of the list of blocks. The search goes from there outwards: of two towers, each its own. By
            default the blocks that see images, see :func:`image_blocks`.

    Raises:
        PatchesError: there is none, or there are several.
        BlocksError: the blocks are not to be found.
    """
    found = find_blocks(module, blocks) if blocks is not None else one_of(module, image_blocks(module))
    inside = {id(part) for block in found for part in block.modules()}
    path = found.path
    while True:
        path = path.rpartition(".")[0]
        around = module.get_submodule(path) if path else module
        prefix = f"{path}." if path else ""
        convolutions = {
            prefix + name: part
            for name, part in around.named_modules()
            if isinstance(part, _ConvNd) and id(part) not in inside
        }
        if convolutions or not path:
            break
    cutting = [name for name, part in convolutions.items() if part.kernel_size == part.stride]
    if len(cutting) != 1:
        raise _not_one(module, f" at {found.path!r}", cutting, convolutions)
    stem = tuple(name for name in convolutions if name != cutting[0])
    return PatchEmbedding(cutting[0], convolutions[cutting[0]], stem)


def image_blocks(module: nn.Module, paths: str | Sequence[str] | None = None) -> list[Blocks]:
    """The lists of blocks that see an image's patches: of an image and a text tower, the first alone.

    Args:
        module: A model, a LightningModule, or anything that holds one.
        paths: Dotted paths of the lists. By default, for each convolution that cuts images, the list whose path has
            most in common with its own.

    Raises:
        BlocksError: the blocks are not to be found.
        PatchesError: nothing cuts images.
    """
    if paths is not None:
        return find_all_blocks(module, paths)
    lists = find_all_blocks(module)
    inside = {id(part) for one in lists for block in one for part in block.modules()}
    convolutions = {
        name: part for name, part in module.named_modules() if isinstance(part, _ConvNd) and id(part) not in inside
    }
    cutting = [name for name, part in convolutions.items() if part.kernel_size == part.stride]
    if not cutting:
        raise _not_one(module, "", cutting, convolutions)
    near: set[str] = set()
    for name in cutting:
        closeness = {one.path: _closeness(name, one.path) for one in lists}
        near |= {path for path, close in closeness.items() if close == max(closeness.values())}
    return [one for one in lists if one.path in near]


def patch_blocks(
    module: nn.Module, paths: str | Sequence[str] | None, prefix: int | None, technique: str, on_texts: str
) -> list[Blocks]:
    """The lists of blocks to which the patches of a technique come, in a model that may cut images in its own way.

    Args:
        module: A model, a LightningModule, or anything that holds one.
        paths: As for :func:`image_blocks`.
        prefix: How many tokens precede the patches, where the user says so: nothing has to cut images then.
        technique: Name of the class, for errors.
        on_texts: What is said of a model of texts: that this is for images, and what is for texts.

    Raises:
        BlocksError: the blocks are not to be found.
        PatchesError: nothing cuts images; with what to do, which for a model of texts is another thing.
    """
    try:
        return image_blocks(module, paths)
    except PatchesError as error:
        if prefix is not None:
            return find_all_blocks(module)
        parts = list(module.modules())
        texts = any(isinstance(part, nn.Embedding) for part in parts)
        sounds = any(isinstance(part, nn.Conv1d) for part in parts)
        if texts or (sounds and not any(isinstance(part, nn.Conv2d) for part in parts)):  # nothing sees images here
            raise PatchesError(f"{error} {on_texts}") from None
        raise PatchesError(f"{error} Say how many tokens precede the patches: {technique}(prefix=1).") from None


def _not_one(module: nn.Module, where: str, cutting: list[str], convolutions: dict[str, nn.Module]) -> PatchesError:
    have = ", ".join(f"{name} {part.kernel_size}" for name, part in convolutions.items()) or "no convolution"
    flat = not convolutions or any(len(part.kernel_size) == 2 for part in convolutions.values())
    return PatchesError(
        f"{type(module).__name__} has {len(cutting)} convolutions that cut images into patches (stride and kernel "
        f"alike) outside its blocks{where}; it has {have}."
        f"{'' if flat else ' What acts on patches has nothing to do here: leave it out.'}"
    )


def _closeness(name: str, path: str) -> tuple[int, int]:
    """How much of their paths two modules share; of those that share as much, the shorter path is closer."""
    parts, others = name.split("."), path.split(".")
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(parts, others, strict=False)))
    return shared, -len(others)


def one_of(module: nn.Module, lists: list[Blocks]) -> Blocks:
    """The one list that was found.

    Raises:
        BlocksError: there are several.
    """
    if len(lists) > 1:
        raise BlocksError(
            f"{type(module).__name__} holds {len(lists)} lists of blocks that see images: "
            f"{', '.join(repr(one.path) for one in lists)}. Say which one is meant, as blocks={lists[0].path!r}."
        )
    return lists[0]


def find_images(batch: Any, channels: int) -> Tensor:
    """The images of a batch, (batch, channels, height, width), in whatever container.

    Raises:
        PatchesError: there are none, or several tensors that could be meant.
    """
    found = [
        one for one in batches.tensors(batch) if one.ndim == 4 and one.shape[1] == channels and one.is_floating_point()
    ]
    if len(found) != 1:
        shapes = ", ".join(str(tuple(one.shape)) for one in batches.tensors(batch))
        raise PatchesError(
            f"The batch has {len(found)} tensors of images with {channels} channels; its shapes: {shapes}. One is "
            "needed, float, (batch, channels, height, width)."
        )
    return found[0]


def relative_positions(module: nn.Module) -> tuple[str, ...]:
    """Names of parameters and buffers that hold an entry for each pair of places, as Swin's and BEiT's do."""
    named = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    return tuple(name for name in named if "relative_position" in name or "rel_pos" in name)


__all__ = [
    "BlocksError",
    "PatchEmbedding",
    "PatchesError",
    "find_images",
    "find_patches",
    "image_blocks",
    "one_of",
    "patch_blocks",
    "relative_positions",
]
