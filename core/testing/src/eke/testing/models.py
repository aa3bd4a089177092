"""Four shapes of Transformer, each a LightningModule that takes milliseconds a step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from eke import ArgumentError
from eke.testing.data import BATCH, CLASSES, LENGTH, PIXELS, VOCABULARY, Images, Loader, Tokens
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset

WIDTH = 16
LAYERS = 4
HEADS = 2
STEPS = 4  # batches in an epoch


def warm_up_then_decay(step: int) -> float:
    """Learning rate as a share of its peak: different at every step, so that a shift by one step shows."""
    return min(step + 1, 3) / 3 * 0.97**step


class TinyModel(LightningModule):
    """What the shapes share: loss, optimizer with two groups, a schedule per step, data.

    Args:
        dropout: Drops activations at this rate, from the global random state, as models do.
        seed: Of the initial weights. The global random state is left as it was.
        layers: Number of blocks.
    """

    dataset: ClassVar[type[Dataset]] = Tokens

    def __init__(self, dropout: float = 0.0, seed: int = 0, layers: int = LAYERS) -> None:
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.make(dropout, layers)

    def make(self, dropout: float, layers: int) -> None:
        raise NotImplementedError

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), on_epoch=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), on_epoch=True)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        logits = self(x)
        return F.cross_entropy(logits.flatten(0, -2), y.flatten())

    def configure_optimizers(self) -> dict[str, Any]:
        matrices = [weight for weight in self.parameters() if weight.ndim > 1]
        vectors = [weight for weight in self.parameters() if weight.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        # eps far above the default: with 1e-8 a gradient that is zero but for rounding (the key's bias) would
        # move a weight by a full step, and two orders of summation could never agree.
        optimizer = torch.optim.AdamW(groups, lr=1e-2, eps=1e-4)
        schedule = LambdaLR(optimizer, warm_up_then_decay)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> Loader:
        return Loader(self.dataset(STEPS * BATCH))

    def val_dataloader(self) -> Loader:
        return Loader(self.dataset(BATCH))

    test_dataloader = val_dataloader


class Attention(nn.Module):
    """Multi-head self-attention with timm's names."""

    def __init__(self, width: int, dropout: float, causal: bool) -> None:
        super().__init__()
        self.num_heads, self.causal = HEADS, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # (batch, length, width)
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(batch, length, width)))


class Mlp(nn.Module):
    """Two linear layers with timm's names."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(2 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.act(self.fc1(x))))


class Block(nn.Module):
    """Pre-norm Transformer block with timm's names."""

    def __init__(self, width: int, dropout: float, causal: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, dropout, causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TinyBlocks(TinyModel):
    """A causal language model with a plain ``nn.ModuleList`` of blocks."""

    def make(self, dropout: float, layers: int) -> None:
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(Block(WIDTH, dropout, causal=True) for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class TinyTransformer(TinyModel):
    """A causal language model around torch's own ``nn.TransformerEncoder``."""

    def make(self, dropout: float, layers: int) -> None:
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.02)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=x.device)
        x = self.embed(x) + self.position[:length]
        return self.head(self.encoder(x, mask=mask, is_causal=True))


class TinyGPT2(TinyModel):
    """Hugging Face's GPT-2. Needs transformers."""

    def make(self, dropout: float, layers: int) -> None:
        self.model = hugging_face("gpt2", layers, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(input_ids=x).logits


class TinyViT(TinyModel):
    """An image classifier with the attribute names of timm's VisionTransformer."""

    dataset = Images

    def make(self, dropout: float, layers: int) -> None:
        patch = PIXELS // 4
        self.patch_embed = nn.Conv2d(3, WIDTH, kernel_size=patch, stride=patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 4 * 4 + 1, WIDTH) * 0.02)
        self.pos_drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(WIDTH, dropout, causal=False) for _ in range(layers)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 3, 8, 8)
        x = self.patch_embed(x).flatten(2).transpose(1, 2)  # (batch, 16, width)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = self.blocks(self.pos_drop(x + self.pos_embed))
        return self.head(self.norm(x)[:, 0])


SHAPES: tuple[type[TinyModel], ...] = (TinyBlocks, TinyTransformer, TinyGPT2, TinyViT)


def hugging_face(kind: str, layers: int = LAYERS, dropout: float = 0.0) -> nn.Module:
    """Build a tiny, randomly initialised Hugging Face model.

    Args:
        kind: ``"gpt2"``, ``"llama"``, ``"bert"`` or ``"vit"``.
        layers: Number of blocks.
        dropout: Rate of every dropout that the model has; Llama has none but in attention.

    Raises:
        ImportError: transformers is not installed.
        ValueError: another ``kind``.
    """
    import transformers as hf

    size = {"hidden_size": WIDTH, "num_hidden_layers": layers, "num_attention_heads": HEADS}
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    words = {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "intermediate_size": 2 * WIDTH}
    if kind == "gpt2":
        rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
        config = hf.GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=LENGTH,
            n_embd=WIDTH,
            n_layer=layers,
            n_head=HEADS,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
            **rates,
        )
        return hf.GPT2LMHeadModel(config)
    if kind == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**size, **words, attention_dropout=dropout, use_cache=False))
    if kind == "bert":
        return hf.BertForMaskedLM(hf.BertConfig(**size, **words, **drop))
    if kind == "vit":
        config = hf.ViTConfig(**size, **drop, intermediate_size=2 * WIDTH, image_size=PIXELS, patch_size=2)
        config.num_labels = CLASSES
        return hf.ViTForImageClassification(config)
    raise ArgumentError(f"kind={kind!r} is not a model of the kit. Use gpt2, llama, bert or vit.")


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers by name, buffers that a state dict leaves out included."""
    yield from model.named_parameters()
    yield from model.named_buffers()
