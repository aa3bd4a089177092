"""Tiny models of every shape that Eke claims to read, and what their configurations say of them.

Each builder returns the model, a batch that runs it, and for each list of blocks the numbers that its configuration
gives: heads, key and value heads, hidden width, width inside the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class Shape:
    """One model: what runs it, and per list of blocks (count, heads, key heads, width, inner width)."""

    model: nn.Module
    batch: dict[str, Any]
    lists: dict[str, tuple[int, int, int, int, int]]
    cross: tuple[str, ...] = ()  # lists whose blocks also hold cross attention
    experts: int = 0
    args: tuple[Any, ...] = field(default=())

    def run(self) -> Any:
        return self.model(*self.args, **self.batch)


def ids(length: int = 6) -> torch.Tensor:
    return torch.arange(2 * length).view(2, length) % 13 + 2


def images(size: int = 16) -> torch.Tensor:
    return torch.linspace(-1, 1, 2 * 3 * size * size).view(2, 3, size, size)


SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40}


def mamba() -> nn.Module:
    """Not of the shapes: it has no attention."""
    return _from(
        "MambaForCausalLM", "MambaConfig", vocab_size=17, hidden_size=16, state_size=4, num_hidden_layers=3,
        time_step_rank=4, pad_token_id=0, bos_token_id=1, eos_token_id=14,
    )  # fmt: skip


def _hf(name: str) -> Any:
    return getattr(pytest.importorskip("transformers"), name)


def _from(model: str, config: str, **settings: Any) -> nn.Module:
    return _hf(model)(_hf(config)(**settings)).eval()


def gpt2() -> Shape:
    model = _from("GPT2LMHeadModel", "GPT2Config", n_embd=16, n_layer=3, n_head=4, vocab_size=17, n_positions=16,
                  bos_token_id=1, eos_token_id=14)  # fmt: skip
    return Shape(model, {"input_ids": ids()}, {"transformer.h": (3, 4, 4, 16, 64)})


def gpt_neox() -> Shape:
    model = _from("GPTNeoXForCausalLM", "GPTNeoXConfig", vocab_size=17, **SMALL)
    return Shape(model, {"input_ids": ids()}, {"gpt_neox.layers": (3, 4, 4, 16, 40)})


def llama() -> Shape:
    model = _from(
        "LlamaForCausalLM", "LlamaConfig", vocab_size=17, num_key_value_heads=2, tie_word_embeddings=True, **SMALL
    )
    return Shape(model, {"input_ids": ids()}, {"model.layers": (3, 4, 2, 16, 40)})


def mistral() -> Shape:
    model = _from(
        "MistralForCausalLM", "MistralConfig", vocab_size=17, num_key_value_heads=1, head_dim=8, sliding_window=4,
        **SMALL,
    )  # fmt: skip
    return Shape(model, {"input_ids": ids()}, {"model.layers": (3, 4, 1, 16, 40)})


def qwen2() -> Shape:
    model = _from("Qwen2ForCausalLM", "Qwen2Config", vocab_size=17, num_key_value_heads=2, **SMALL)
    return Shape(model, {"input_ids": ids()}, {"model.layers": (3, 4, 2, 16, 40)})


def qwen3() -> Shape:
    model = _from("Qwen3ForCausalLM", "Qwen3Config", vocab_size=17, num_key_value_heads=2, head_dim=8, **SMALL)
    return Shape(model, {"input_ids": ids()}, {"model.layers": (3, 4, 2, 16, 40)})


def phi3() -> Shape:
    model = _from("Phi3ForCausalLM", "Phi3Config", vocab_size=17, num_key_value_heads=2, pad_token_id=0, **SMALL)
    return Shape(model, {"input_ids": ids()}, {"model.layers": (3, 4, 2, 16, 40)})


def gemma2() -> Shape:
    model = _from("Gemma2ForCausalLM", "Gemma2Config", vocab_size=17, num_key_value_heads=2, head_dim=8, **SMALL)
    return Shape(model, {"input_ids": ids()}, {"model.layers": (3, 4, 2, 16, 40)})


def mixtral() -> Shape:
    model = _from(
        "MixtralForCausalLM", "MixtralConfig", vocab_size=17, num_key_value_heads=2, num_local_experts=3,
        output_router_logits=True, **SMALL,
    )  # fmt: skip
    return Shape(model, {"input_ids": ids()}, {"model.layers": (3, 4, 2, 16, 40)}, experts=3)


def bert() -> Shape:
    model = _from("BertForMaskedLM", "BertConfig", vocab_size=17, **SMALL)
    return Shape(model, {"input_ids": ids()}, {"bert.encoder.layer": (3, 4, 4, 16, 40)})


def bert_classifier() -> Shape:
    model = _from("BertForSequenceClassification", "BertConfig", vocab_size=17, **SMALL)
    return Shape(model, {"input_ids": ids()}, {"bert.encoder.layer": (3, 4, 4, 16, 40)})


def roberta() -> Shape:
    model = _from("RobertaForSequenceClassification", "RobertaConfig", vocab_size=17, **SMALL)
    return Shape(model, {"input_ids": ids()}, {"roberta.encoder.layer": (3, 4, 4, 16, 40)})


def distilbert() -> Shape:
    model = _from("DistilBertModel", "DistilBertConfig", vocab_size=17, dim=16, n_layers=3, n_heads=4, hidden_dim=40)
    return Shape(model, {"input_ids": ids()}, {"transformer.layer": (3, 4, 4, 16, 40)})


def t5() -> Shape:
    model = _from(
        "T5ForConditionalGeneration", "T5Config", vocab_size=17, d_model=16, d_kv=8, d_ff=40, num_layers=3,
        num_decoder_layers=2, num_heads=4, decoder_start_token_id=0,
    )  # fmt: skip
    lists = {"encoder.block": (3, 4, 4, 16, 40), "decoder.block": (2, 4, 4, 16, 40)}
    return Shape(model, {"input_ids": ids(), "labels": ids(5)}, lists, cross=("decoder.block",))


def bart() -> Shape:
    model = _from(
        "BartForConditionalGeneration", "BartConfig", vocab_size=17, d_model=16, encoder_layers=3, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=2, encoder_ffn_dim=40, decoder_ffn_dim=24,
        max_position_embeddings=16,
    )  # fmt: skip
    lists = {"model.encoder.layers": (3, 4, 4, 16, 40), "model.decoder.layers": (2, 2, 2, 16, 24)}
    return Shape(model, {"input_ids": ids(), "labels": ids(5)}, lists, cross=("model.decoder.layers",))


def clip() -> Shape:
    text = {**SMALL, "vocab_size": 17, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 14}
    vision = {**SMALL, "hidden_size": 32, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    model = _from("CLIPModel", "CLIPConfig", text_config=text, vision_config=vision, projection_dim=16)
    lists = {
        "text_model.encoder.layers": (3, 4, 4, 16, 40),
        "vision_model.encoder.layers": (3, 2, 2, 32, 40),
    }
    return Shape(model, {"input_ids": ids(), "pixel_values": images()}, lists)


def vit() -> Shape:
    model = _from("ViTForImageClassification", "ViTConfig", image_size=16, patch_size=8, **SMALL)
    return Shape(model, {"pixel_values": images()}, {"vit.layers": (3, 4, 4, 16, 40)})


def dinov2() -> Shape:
    small = {key: value for key, value in SMALL.items() if key != "intermediate_size"}
    model = _from("Dinov2Model", "Dinov2Config", image_size=16, patch_size=8, mlp_ratio=2, **small)
    return Shape(model, {"pixel_values": images()}, {"encoder.layer": (3, 4, 4, 16, 32)})


def dinov2_swiglu() -> Shape:
    small = {key: value for key, value in SMALL.items() if key != "intermediate_size"}
    model = _from("Dinov2Model", "Dinov2Config", image_size=16, patch_size=8, mlp_ratio=4, use_swiglu_ffn=True, **small)
    return Shape(model, {"pixel_values": images()}, {"encoder.layer": (3, 4, 4, 16, 48)})


def swin() -> Shape:
    model = _from(
        "SwinModel", "SwinConfig", image_size=32, patch_size=4, embed_dim=8, depths=[2, 3], num_heads=[2, 4],
        window_size=4, mlp_ratio=3.0,
    )  # fmt: skip
    lists = {"encoder.layers.0.blocks": (2, 2, 2, 8, 24), "encoder.layers.1.blocks": (3, 4, 4, 16, 48)}
    return Shape(model, {"pixel_values": images(32)}, lists)


def whisper() -> Shape:
    model = _from(
        "WhisperForConditionalGeneration", "WhisperConfig", vocab_size=17, num_mel_bins=8, d_model=16,
        encoder_layers=3, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=2, encoder_ffn_dim=40, decoder_ffn_dim=24,
        max_source_positions=8, max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    lists = {"model.encoder.layers": (3, 4, 4, 16, 40), "model.decoder.layers": (2, 2, 2, 16, 24)}
    batch = {"input_features": torch.linspace(-1, 1, 2 * 8 * 16).view(2, 8, 16), "decoder_input_ids": ids(5)}
    return Shape(model, batch, lists, cross=("model.decoder.layers",))


def wav2vec2() -> Shape:
    model = _from(
        "Wav2Vec2ForCTC", "Wav2Vec2Config", vocab_size=17, conv_dim=[8, 8], conv_stride=[2, 2], conv_kernel=[3, 3],
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, mask_time_length=2, layerdrop=0.0,
        ctc_zero_infinity=True, pad_token_id=0, **SMALL,
    )  # fmt: skip
    batch = {"input_values": torch.linspace(-1, 1, 2 * 64).view(2, 64)}
    return Shape(model, batch, {"wav2vec2.encoder.layers": (3, 4, 4, 16, 40)})


def torch_encoder() -> Shape:
    layer = nn.TransformerEncoderLayer(16, 4, 40, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    return Shape(model, {}, {"layers": (3, 4, 4, 16, 40)}, args=(torch.randn(2, 6, 16),))


def torch_transformer() -> Shape:
    model = nn.Transformer(16, 4, 3, 2, 40, batch_first=True).eval()
    lists = {"encoder.layers": (3, 4, 4, 16, 40), "decoder.layers": (2, 4, 4, 16, 40)}
    return Shape(model, {}, lists, cross=("decoder.layers",), args=(torch.randn(2, 6, 16), torch.randn(2, 5, 16)))


class TimmAttention(nn.Module):
    """As timm's Vision Transformer has it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = heads, width // heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.attn_drop, self.proj, self.proj_drop = nn.Dropout(0.0), nn.Linear(width, width), nn.Dropout(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TimmMlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class TimmBlock(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(width), TimmAttention(width, heads), nn.Identity()
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(width), TimmMlp(width, inner), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class TimmViT(nn.Module):
    def __init__(self, width: int = 16, heads: int = 4, inner: int = 40, depth: int = 3) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 8, 8)
        self.pos_embed = nn.Parameter(torch.zeros(1, 4, width))
        self.blocks = nn.Sequential(*[TimmBlock(width, heads, inner) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos_embed
        return self.head(self.norm(self.blocks(x)).mean(1))


def timm_vit() -> Shape:
    return Shape(TimmViT(), {}, {"blocks": (3, 4, 4, 16, 40)}, args=(images(),))


class FlatBlock(nn.Module):
    """A block without modules of its own for attention and MLP; its layers' names say nothing of MLP up and down."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_a, self.ln_b = nn.LayerNorm(width), nn.LayerNorm(width)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.ff = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.ln_a(x)
        q, k, v = (one(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in (self.wq, self.wk, self.wv))
        x = x + self.wo(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.ff(self.ln_b(x))


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 16)
        self.blocks = nn.ModuleList(FlatBlock(16, 4, 40) for _ in range(3))
        self.head = nn.Linear(16, 17)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def plain_list() -> Shape:
    return Shape(Flat().eval(), {}, {"blocks": (3, 4, 4, 16, 40)}, args=(ids(),))


SHAPES: dict[str, Callable[[], Shape]] = {
    build.__name__: build
    for build in (
        gpt2, gpt_neox, llama, mistral, qwen2, qwen3, phi3, gemma2, mixtral, bert, roberta, distilbert, t5, bart, clip,
        vit, dinov2, dinov2_swiglu, swin, whisper, wav2vec2, torch_encoder, torch_transformer, timm_vit, plain_list,
    )
}  # fmt: skip
