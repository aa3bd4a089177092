"""A byte-level GPT that knows Python and is moved to C++: the headers that torch brings along."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader

from eke_bench.workloads.base import Size, endless, lr_factor, shape
from eke_bench.workloads.gpt import GPT, ByteGPT, Windows, read, spread, standard_library

HEADERS = ("ATen", "c10", "torch")


@cache
def headers() -> tuple[Tensor, Tensor]:
    """C++ of the installed torch, split by a hash of each file's path. Generated files, which repeat, are left out."""
    root = Path(torch.__file__).parent / "include"
    files = [file for part in HEADERS for file in (root / part).rglob("*.h") if "ATen/ops" not in file.as_posix()]
    return read(root, files)


class Finetune(GPT):
    """The byte-level GPT of the standard library, moved to the C++ headers of torch."""

    name = "finetune"
    sizes: ClassVar[dict[str, Size]] = {
        "smoke": Size(
            steps=12, batch=4, shape=shape(2, 32), smaller=shape(1, 32), lrs=(2e-3, 4e-3, 8e-3),
            seeds=2, evaluations=2, options={"length": 32, "held_out": 32, "pretraining": 24, "pretraining_lr": 8e-3},
        ),
        "cpu": Size(
            steps=1200, batch=8, shape=shape(2, 64), smaller=shape(1, 64), lrs=(2e-3, 4e-3, 8e-3),
            options={"length": 128, "held_out": 512, "pretraining": 2400, "pretraining_lr": 8e-3},
        ),
        "gpu": Size(
            steps=1002, batch=64, shape=shape(8, 512), smaller=shape(4, 512), lrs=(2e-4, 5e-4, 1e-3),
            options={"length": 512, "held_out": 1024, "pretraining": 3000, "pretraining_lr": 1e-3},
        ),
    }  # fmt: skip

    def text(self) -> tuple[Tensor, Tensor]:
        return headers()

    def model(self, shape: Mapping[str, int], lr: float, steps: int) -> ByteGPT:
        model = super().model(shape, lr, steps)
        model.load_state_dict(pretrained(json.dumps(dict(shape), sort_keys=True), self.size_key()))
        return model

    def size_key(self) -> str:
        """What the pretrained weights follow from, besides the shape."""
        return json.dumps({"batch": self.size.batch, **self.size.options}, sort_keys=True)

    @torch.no_grad()
    def finish(self, model: LightningModule) -> dict[str, float]:
        """How much of the Python is left."""
        model.eval()
        windows = Windows(standard_library()[1], self.size.options["length"])
        picked = spread(windows, self.size.options["held_out"])
        device = model.head.weight.device
        losses = [model.loss(batch.to(device)) * len(batch) for batch in DataLoader(picked, self.val_batch)]
        return {"python_loss": float(sum(losses)) / len(picked)}


@cache
def pretrained(shape: str, size: str) -> dict[str, Tensor]:
    """Weights of a model that has learnt the standard library. Trained once, then read from the user's cache folder."""
    key = hashlib.sha256(f"{shape} {size} {torch.__version__}".encode()).hexdigest()[:16]
    file = cache_folder() / f"python-{key}.pt"
    if file.exists():
        try:
            return torch.load(file, weights_only=True)
        except Exception:  # whatever a cut or foreign file makes torch say: it is only a cache
            file.unlink()
    weights = pretrain(json.loads(shape), json.loads(size))
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    torch.save(weights, part)
    part.replace(file)  # whole or not at all
    return weights


def pretrain(shape: Mapping[str, int], size: Mapping[str, float]) -> dict[str, Tensor]:
    """Train on the standard library by hand, leaving the caller's random state as it was."""
    steps = int(size["pretraining"])
    device = "cuda" if torch.cuda.is_available() and shape["width"] >= 256 else "cpu"
    with torch.random.fork_rng():
        torch.manual_seed(12345)
        model = ByteGPT(**shape, length=size["length"], lr=size["pretraining_lr"], steps=steps).to(device)
    windows = Windows(standard_library()[0], size["length"])
    order = torch.Generator().manual_seed(12345)
    loader = DataLoader(windows, size["batch"], shuffle=True, drop_last=True, generator=order)
    optimizer = model.configure_optimizers()["optimizer"]
    rise = max(1, round(model.warmup * steps))
    with torch.enable_grad():
        for step, batch in zip(range(steps), endless(loader), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = size["pretraining_lr"] * lr_factor(step, steps, rise)
            model.loss(batch.to(device)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return {name: weight.cpu() for name, weight in model.state_dict().items()}


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/eke-bench``, or ``~/.cache/eke-bench``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eke-bench"
