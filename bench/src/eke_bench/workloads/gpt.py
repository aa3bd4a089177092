"""A byte-level GPT that learns the source code of Python's standard library."""

from __future__ import annotations

import hashlib
import math
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset

from eke_bench.workloads.base import Learner, Size, Workload, initialize, shape
from eke_bench.workloads.blocks import Block

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
HELD_OUT = 20  # one file in this many
HEAD_WIDTH = 32


def read(root: Path, files: Iterable[Path]) -> tuple[Tensor, Tensor]:
    """Training and held-out text, each (bytes,), uint8, split by a hash of each file's path below ``root``."""
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for file in sorted(files):
        name = file.relative_to(root).as_posix()
        parts[int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT == 0].append(file.read_bytes())
    train, held_out = (torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8) for part in parts)
    return train, held_out


@cache
def standard_library() -> tuple[Tensor, Tensor]:
    """The sources of this Python's standard library, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    return read(root, (file for file in root.rglob("*.py") if not LEFT_OUT & set(file.relative_to(root).parts)))


class Windows(Dataset):
    """Text cut into windows of ``length + 1`` bytes that overlap by the one byte which is only predicted."""

    def __init__(self, text: Tensor, length: int) -> None:
        self.text, self.length = text, length

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.length

    def __getitem__(self, index: int) -> Tensor:  # (length + 1,), int64
        start = index * self.length
        return self.text[start : start + self.length + 1].long()


def spread(windows: Windows, count: int) -> Subset:
    """At most ``count`` of the windows, spread over the whole text."""
    count = min(count, len(windows))
    return Subset(windows, torch.linspace(0, len(windows) - 1, count).round().long().tolist())


class ByteGPT(Learner):
    """Predicts each byte from those before it.

    Args:
        blocks: Number of blocks.
        width: Width of the residual stream, a multiple of 32.
        length: Longest context in bytes.
    """

    def __init__(self, blocks: int, width: int, length: int, lr: float, steps: int) -> None:
        super().__init__(lr, steps)
        self.embed, self.position = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, width // HEAD_WIDTH, causal=True) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        self.apply(initialize)
        for block in self.blocks:  # each adds to the stream twice: keep its variance from growing with depth
            for weight in (block.attn.proj.weight, block.down.weight):
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * blocks))

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, length) to (batch, length, 256)
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def loss(self, batch: Tensor) -> Tensor:  # (batch, length + 1): the last byte is only predicted
        logits = self(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


class GPT(Workload):
    """Byte-level language model on 11 MB of Python."""

    name = "gpt"
    unit = "nats a byte"
    sizes: ClassVar[dict[str, Size]] = {
        "smoke": Size(
            steps=24, batch=4, shape=shape(2, 32), smaller=shape(1, 32), lrs=(4e-3, 8e-3, 16e-3),
            deep=shape(4, 32), seeds=2, evaluations=2, options={"length": 32, "held_out": 32},
        ),
        # Of 1 and 2 blocks of width 64 to 192 for 40 seconds of one core, 1 block of 64 came out best (1.579 nats at a
        # rate of 0.016) and this one second (1.664): the smallest that has a depth to work on.
        "cpu": Size(
            steps=2400, batch=8, shape=shape(2, 64), smaller=shape(1, 64), lrs=(4e-3, 8e-3, 16e-3),
            deep=shape(4, 64), options={"length": 128, "held_out": 512},
        ),
        "gpu": Size(
            steps=3000, batch=64, shape=shape(8, 512), smaller=shape(4, 512), lrs=(5e-4, 1e-3, 2e-3),
            deep=shape(24, 512), options={"length": 512, "held_out": 1024},
        ),
    }  # fmt: skip

    def text(self) -> tuple[Tensor, Tensor]:
        return standard_library()

    def model(self, shape: Mapping[str, int], lr: float, steps: int) -> ByteGPT:
        return ByteGPT(**shape, length=self.size.options["length"], lr=lr, steps=steps)

    def data(self) -> tuple[Dataset, Dataset]:
        train, held_out = self.text()
        length = self.size.options["length"]
        return Windows(train, length), spread(Windows(held_out, length), self.size.options["held_out"])

    def tokens(self) -> int:
        return self.size.batch * self.size.options["length"]


class LongGPT(GPT):
    """The same with four times the context, for what acts on the length of sequences."""

    name = "gpt-long"
    sizes: ClassVar[dict[str, Size]] = {
        "smoke": replace(GPT.sizes["smoke"], batch=2, options={"length": 64, "held_out": 16}),
        "cpu": replace(GPT.sizes["cpu"], steps=600, batch=4, options={"length": 512, "held_out": 128}),
        "gpu": replace(GPT.sizes["gpu"], batch=16, options={"length": 2048, "held_out": 256}),
    }
