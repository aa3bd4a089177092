"""Measure attention: training steps of a GPT at length 1024 whose blocks write attention out, and with it replaced.

python benchmark.py --size cpu --out ../../benchmarks/cpu-2core
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from eke import measure
from eke_attention import DOTA, ELSA, Attention, Sanger, SlidingWindow, ViTCoD
from eke_attention.sites import install
from eke_bench import Timing, main_of
from eke_bench.workloads.blocks import Block
from torch import Tensor, nn
from torch.nn import functional as F

SIZES = {"smoke": (64, 2, 2, 32), "cpu": (1024, 2, 4, 128), "gpu": (4096, 1, 4, 1024)}  # length, batch, blocks, width
PLAIN, SDPA, WINDOW = "attention written out", "SDPA", "window of 128"
KINDS: dict[str, Callable[[], Attention]] = {
    SDPA: Attention,
    WINDOW: lambda: Attention(SlidingWindow(128)),
    "window of 128, by a mask": lambda: Attention(SlidingWindow(128), "masked"),
    "Sanger": lambda: Attention(Sanger()),
    "Sanger, gathered": lambda: Attention(Sanger(), "gather"),
    "ELSA": lambda: Attention(ELSA(calibrate=1)),
    "DOTA, a tenth": lambda: Attention(DOTA(0.1, calibrate=1)),
    "ViTCoD": lambda: Attention(ViTCoD(collect=1)),
}


class WrittenOut(nn.Module):
    """Causal attention as many write it: scores, softmax, product."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        found = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        return self.proj((found.masked_fill(later, -torch.inf).softmax(-1) @ value).transpose(1, 2).flatten(2))


class GPT(nn.Module):
    def __init__(self, length: int, blocks: int, width: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(256, width), nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, width // 32) for _ in range(blocks))
        for block in self.blocks:
            block.attn = WrittenOut(width, width // 32)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Step:
    """A whole training step: forward, backward, optimizer, and what a pattern learns."""

    def __init__(self, size: str, plugin: Attention | None) -> None:
        length, batch, blocks, width = SIZES[size]
        device = torch.device("cuda" if size == "gpu" else "cpu")
        torch.manual_seed(0)
        self.model = GPT(length, blocks, width).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4)
        self.data = torch.randint(0, 256, (batch, length + 1), device=device)
        self.plugin, self.sites, self.left = plugin, [], {}
        if plugin is not None:
            plugin._used, plugin._training = plugin._choose(device)[0], True
            self.sites, self.left = install(self.model, plugin._attend)
            for site in self.sites:
                site.wants_input = plugin.pattern is not None and plugin.pattern.wants_input
            self()  # what is learned in the first step is not part of the others

    def __call__(self) -> None:
        loss = F.cross_entropy(self.model(self.data[:, :-1]).flatten(0, 1), self.data[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.plugin is not None and self.plugin.pattern is not None:
            layers = {site.path: site.layer for site in self.sites}
            self.plugin.pattern.after_step(layers, 1, lambda tensor: tensor)


def steps(size: str) -> dict[str, Callable[[], Any]]:
    return {PLAIN: Step(size, None), **{label: Step(size, build()) for label, build in KINDS.items()}}


def facts(label: str, step: Step, size: str) -> dict[str, Any]:
    peak = measure.memory_peak(step, step.model, step.optimizer)["total"]
    return {"peak MiB": round(peak / 2**20, 1)}


def headline(summary: Mapping[str, Any]) -> str:
    rows, length = summary["timing"], SIZES[summary["size"]][0]

    def of(label: str) -> str:
        memory = rows[label]["facts"]["peak MiB"] / rows[PLAIN]["facts"]["peak MiB"]
        return f"{rows[label]['ratio'][0]:.2f} of the time and {memory:.2f} of the peak memory"

    return (
        f"a step of a 4-block GPT at length {length} takes {of(SDPA)} of one that writes attention out, with a window "
        f"of 128 {of(WINDOW)}"
    )


STEP = Timing("attention", "step at length 1024", steps, facts, rounds=15, headline=headline)

if __name__ == "__main__":
    sys.exit(main_of(STEP))
