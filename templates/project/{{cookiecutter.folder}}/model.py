"""A byte-level GPT as a LightningModule. Put your own model here: Eke's techniques find the blocks by themselves."""

from __future__ import annotations

import math

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 256  # a token is a byte
HEAD_WIDTH = 32


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # (batch, length, width), as everywhere below
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, HEAD_WIDTH).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (batch, heads, length, head width)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ByteGPT(LightningModule):
    """Predicts each byte from those before it.

    Args:
        layers: Number of blocks.
        width: Width of the residual stream, a multiple of 32.
        length: Longest context in bytes.
        lr: Highest learning rate; reached after the warm-up, zero after the last step.
        warmup: Share of the steps spent rising to ``lr``.
    """

    def __init__(self, layers: int, width: int, length: int, lr: float, *, warmup: float = 0.05) -> None:
        super().__init__()
        if width % HEAD_WIDTH:
            raise ValueError(f"width={width} does not divide into heads of {HEAD_WIDTH}. Give a multiple.")
        self.save_hyperparameters()
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.apply(_initialize)
        for block in self.blocks:  # each block adds to the stream twice: keep its variance from growing with depth
            for weight in (block.attention.out.weight, block.down.weight):
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * layers))

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, length) to (batch, length, 256)
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def loss(self, windows: Tensor) -> Tensor:  # (batch, length + 1): the last byte is only predicted
        logits = self(windows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())

    def training_step(self, windows: Tensor, batch_idx: int) -> Tensor:
        return self.loss(windows)

    def validation_step(self, windows: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(windows), prog_bar=True, batch_size=len(windows))

    def configure_optimizers(self) -> dict:
        matrices = [weight for weight in self.parameters() if weight.ndim >= 2]
        vectors = [weight for weight in self.parameters() if weight.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        # fused: on a CPU torch otherwise picks a Python loop that takes five times as long. Under mixed precision
        # Lightning refuses to clip the gradients of one that could unscale them by itself, as fused ones can.
        fused = not str(self.trainer.precision).endswith("mixed")
        optimizer = torch.optim.AdamW(groups, lr=self.hparams.lr, betas=(0.9, 0.95), fused=fused)
        steps = int(self.trainer.estimated_stepping_batches)
        rise = max(1, round(self.hparams.warmup * steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, steps, rise))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def lr_factor(step: int, steps: int, rise: int) -> float:
    """Share of the highest learning rate at ``step`` of ``steps``: up over ``rise`` steps, then straight down to zero.

    A run is only judged fairly when its schedule ends with its budget: a run cut short looks worse than it is.
    """
    return min((step + 1) / rise, max(0.0, (steps - step) / max(1, steps - rise)), 1.0)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
