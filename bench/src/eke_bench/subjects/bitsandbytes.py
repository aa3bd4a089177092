"""A loop by hand with bitsandbytes' 8-bit AdamW."""

from __future__ import annotations

from bitsandbytes.optim import AdamW8bit
from torch import nn
from torch.optim import Optimizer

from eke_bench.subjects.hand import Hand


class BitsAndBytes(Hand):
    def optimizer(self, model: nn.Module, built: Optimizer) -> Optimizer:
        first = built.param_groups[0]
        groups = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in built.param_groups]
        return AdamW8bit(groups, lr=first["initial_lr"], betas=first["betas"], eps=first["eps"])
