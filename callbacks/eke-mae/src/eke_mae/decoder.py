"""What pretraining adds to an encoder and leaves behind: a decoder, a mask token, a head. None is in the state dict."""

from __future__ import annotations

from typing import Any

import torch
from eke import ArgumentError
from torch import Tensor, nn
from torch.nn import functional as F

NAME = "eke_mae"  # of the attribute that a model has while it is pretrained


def pixels_of_patches(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """(batch, channels, height, width) to (batch, patches, pixels): patches row by row, in each pixel by pixel, all
    channels of one together.

    Source:
        He et al. 2022, ``patchify`` of the authors' code.
    """
    batch, channels = images.shape[:2]
    rows, columns = (side // length for side, length in zip(images.shape[2:], patch, strict=True))
    cut = images[..., : rows * patch[0], : columns * patch[1]]
    cut = cut.reshape(batch, channels, rows, patch[0], columns, patch[1])
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)


def normalized(pixels: Tensor) -> Tensor:
    """Each patch with mean 0 and unbiased variance 1: ``(t - mean) / sqrt(var + 1e-6)``, as He et al. 2022."""
    return (pixels - pixels.mean(-1, keepdim=True)) / (pixels.var(-1, keepdim=True) + 1e-6).sqrt()


def positions_2d(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed sine and cosine positions of a grid, (patches, width), float32: half of the width for each axis.

    Raises:
        ValueError: a width that is no multiple of 4.
    """
    if width % 4:
        raise ArgumentError(f"decoder_width={width} is no multiple of 4, which its positions along two axes need.")
    rates = 10_000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    angles = [axis.flatten()[:, None] * rates for axis in (columns, rows)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()


class Hidden(nn.Module):
    """A module that stays out of its parent's state dict: checkpoints of the model hold what the model has without it.

    Its parameters are trained with the others; :meth:`own` and :meth:`put_back` keep them elsewhere.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_miss_nothing)

    def own(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.named_parameters()}

    @torch.no_grad()
    def put_back(self, own: dict[str, Tensor]) -> None:
        for name, tensor in self.named_parameters():
            tensor.copy_(own[name])

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        return {} if destination is None else destination


def _miss_nothing(module: Hidden, incompatible: Any) -> None:
    own = {name for name, _ in module.named_parameters()}
    missing = incompatible.missing_keys
    missing[:] = [key for key in missing if key.partition(f"{NAME}.")[2] not in own]


class Block(nn.Module):
    """Pre-norm Transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Decoder(Hidden):
    """From the features of visible patches to the pixels of all: MAE's light decoder.

    Args:
        features: Width of the encoder.
        width, depth, heads: Of the decoder.
        pixels: Of a patch, all channels.
    """

    def __init__(self, features: int, width: int, depth: int, heads: int, pixels: int) -> None:
        super().__init__()
        positions_2d((1, 1), width)  # refuses a width that cannot be
        self.narrow = nn.Linear(features, width)
        self.mask = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, pixels)
        self.apply(_initialize)
        nn.init.normal_(self.mask, std=0.02)

    def forward(self, features: Tensor, order: Tensor, visible: int, grid: tuple[int, int]) -> Tensor:
        """Predict all patches from those that the encoder saw.

        Args:
            features: (batch, own + visible, width): tokens of the model's own, then patches.
            order: (batch, patches), a permutation for each image; its first ``visible`` are those of ``features``.
            visible: How many those are.
            grid: Patches along height and width.

        Returns:
            (batch, patches, pixels), in the order of the image.
        """
        seen = self.narrow(features)
        own = seen.shape[1] - visible
        masks = self.mask.to(seen.dtype).expand(len(seen), order.shape[1] - visible, -1)
        shuffled = torch.cat([seen[:, own:], masks], dim=1)
        whole = shuffled.gather(1, order.argsort(1).unsqueeze(-1).expand(-1, -1, shuffled.shape[-1]))
        x = torch.cat([seen[:, :own], whole + positions_2d(grid, whole.shape[-1]).to(whole)], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x))[:, own:]


class Head(Hidden):
    """A linear map from features to what a hidden patch is to give, and the token that stands in for one."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.zeros(features))
        self.out = nn.Linear(features, outputs)
        self.apply(_initialize)
        nn.init.normal_(self.mask, std=0.02)

    def forward(self, features: Tensor) -> Tensor:
        return self.out(features)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
