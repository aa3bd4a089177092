"""A Llama-shaped decoder of 6.7 billion parameters and a batch of one sample, for a forecast of its memory.

eke forecast llama7b.py:build zero:stage=3,compute_dtype=bfloat16 --ranks 64 --gpu-memory 16GiB --png llama7b.png
"""

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM


class Llama(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        # transformers' defaults are the 7B model's: 32 layers, width 4096, MLP 11008, 32 heads, 32000 tokens.
        self.model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=2048, use_cache=False))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-4)


def build() -> tuple[LightningModule, Tensor]:
    return Llama(), torch.zeros(1, 2048, dtype=torch.long)
