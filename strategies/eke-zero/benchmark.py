"""Measure ZeRO: a GPT's training step on two processes, under DDP and under each stage: seconds, bytes held, peak.

python benchmark.py --size cpu --out ../../benchmarks/cpu-2core
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch
from eke import measure
from eke.seams.wrapped import walk
from eke.testing import run_ranks
from eke.testing.run import make_trainer, quiet
from eke_bench.workloads.blocks import Block
from eke_zero import ZeRO
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

SIZES = {"smoke": (32, 2, 2, 32, 4), "cpu": (256, 2, 6, 256, 12), "gpu": (2048, 2, 24, 2048, 12)}
KINDS: dict[str, dict[str, Any] | None] = {
    "DDP": None,
    "stage 1": {"stage": 1},
    "stage 2": {"stage": 2},
    "stage 3": {"stage": 3},
    "stage 3, recomputing": {"stage": 3, "remat": True},
    "stage 2, optimizer offloaded": {"stage": 2, "offload": "optimizer"},
    "stage 3, weights offloaded": {"stage": 3, "offload": "params"},
}
WORLD, WARM = 2, 2


class GPT(LightningModule):
    def __init__(self, length: int, blocks: int, width: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, width // 32, causal=True) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x = self.embed(batch[:, :-1]) + self.position.weight
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-4)


class Watcher(Callback):
    """Times the steps but the first ones; counts in the last, which is not timed."""

    def __init__(self, steps: int) -> None:
        self.steps, self.seconds, self.held, self.peak = steps, [], {}, 0

    def on_train_batch_start(self, trainer: Any, model: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.steps - 1:
            *_, optimizer = walk(trainer.optimizers[0])
            self.held = {
                "weights": sum(_local(p).nbytes for p in model.parameters()),
                "states": sum(_local(v).nbytes for s in optimizer.state.values() for v in s.values()),
            }
            self.tracking = measure.tracked_memory(model, optimizer)
            self.result = self.tracking.__enter__()
        self.since = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, model: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.steps:
            self.tracking.__exit__(None, None, None)
            self.peak = self.result["total"]
        elif trainer.global_step > WARM:
            self.seconds.append(time.perf_counter() - self.since)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def once(settings: dict[str, Any] | None, size: str) -> dict[str, Any]:
    """One run of a few steps."""
    length, batch, blocks, width, steps = SIZES[size]

    def work(rank: int) -> dict[str, Any]:
        torch.manual_seed(0)
        watcher = Watcher(steps)
        strategy = [ZeRO(trial=False, **settings)] if settings else []
        accelerator = {"accelerator": "gpu"} if size == "gpu" else {}
        trainer = make_trainer(*strategy, epochs=1, world=WORLD, callbacks=[watcher], **accelerator)
        data = DataLoader(torch.randint(256, (steps * batch, length + 1)), batch)
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(GPT(length, blocks, width), data)
        return {"seconds": median(watcher.seconds), "held": watcher.held, "peak": watcher.peak}

    return run_ranks(work, WORLD, timeout=600)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    rounds = 1 if options.size == "smoke" else options.rounds
    runs: dict[str, list[dict[str, Any]]] = {label: [] for label in KINDS}
    for _ in range(rounds):  # interleaved: what else the machine does meets all alike
        for label, settings in KINDS.items():
            runs[label].append(once(settings, options.size))
    rows = {}
    for label, several in runs.items():
        ratios = sorted(one["seconds"] / plain["seconds"] for one, plain in zip(several, runs["DDP"], strict=True))
        rows[label] = {
            "seconds": median(one["seconds"] for one in several),
            "ratio": [median(ratios), ratios[0], ratios[-1]],
            "held": several[0]["held"],
            "peak": several[0]["peak"],
        }
    ddp, third = rows["DDP"], rows["stage 3"]
    share = sum(third["held"].values()) / sum(ddp["held"].values())
    length, batch, blocks, width, _ = SIZES[options.size]
    headline = (
        f"on 2 processes stage 3 holds {share:.2f} of DDP's weights and states, its step's peak is "
        f"{third['peak'] / ddp['peak']:.2f} of DDP's and takes {third['ratio'][0]:.2f} of the time"
    )
    result = {
        "name": "zero", "title": f"step of a {blocks}-block GPT on {WORLD} processes", "size": options.size,
        "shape": {"length": length, "batch": batch, "blocks": blocks, "width": width}, "rounds": rounds,
        "torch": torch.__version__, "rows": rows, "headline": headline,
    }  # fmt: skip
    print("| | ms a step | of DDP's, least to most | weights, MiB | states, MiB | peak of a step, MiB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for label, row in rows.items():
        middle, least, most = row["ratio"]
        held = [f"{row['held'][what] / 2**20:.1f}" for what in ("weights", "states")]
        ratio = f"{middle:.2f}, {least:.2f} to {most:.2f}"
        print(
            "| " + " | ".join([label, f"{1e3 * row['seconds']:.0f}", ratio, *held, f"{row['peak'] / 2**20:.1f}"]) + " |"
        )
    print(headline)
    (options.out / f"zero-step-on-two-processes-{options.size}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
