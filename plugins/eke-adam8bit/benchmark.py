"""Measure Adam8bit: state bytes, step time against fused 32-bit AdamW, compile seconds, error of a step, final loss.

    python benchmark.py [--quick] [--json FILE] [--only times error loss] [--seeds 3] [--steps 300]

Times are processor seconds of one thread, interleaved: one step of each optimizer in turn, ratios within a round,
median and quartiles over the rounds. The second fused AdamW is the control: what its ratio strays from 1 is noise.
With ``--json``, parts that are left out keep what the file says.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from eke_adam8bit import AdamW8bit, eight_bit, state_bytes
from eke_adam8bit.optimizer import compiled
from eke_adam8bit.plugin import embeddings
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Pre-norm Transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (batch, length, width)
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Byte-level language model."""

    def __init__(self, width: int, layers: int, length: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:  # (batch, length + 1) bytes, to the mean loss in nats
        inputs, targets = x[:, :-1], x[:, 1:]
        hidden = self.blocks(self.embed(inputs) + self.position.weight[: inputs.shape[1]])
        return F.cross_entropy(self.head(self.norm(hidden)).flatten(0, 1), targets.flatten())


def standard_library() -> tuple[Tensor, Tensor]:
    """Sources of Python's standard library as bytes: every twentieth file is for validation."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3")
    files = sorted(path for path in root.rglob("*.py") if not set(path.relative_to(root).parts) & set(skipped))
    parts = [b"".join(f.read_bytes() for i, f in enumerate(files) if (i % 20 == 7) is held) for held in (False, True)]
    return tuple(torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts)


def batch(text: Tensor, generator: torch.Generator, size: int = 8, length: int = 128) -> Tensor:
    starts = torch.randint(len(text) - length, (size, 1), generator=generator)
    return text[starts + torch.arange(length + 1)].long()


def fused(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3, fused=True)


def quartiles(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "low": low, "high": high}


def paired(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Milliseconds of each, and its ratio to the first within each round."""
    for _ in range(3):
        for step in steps.values():
            step()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        for name in list(steps)[:: 1 if number % 2 else -1]:
            start = time.thread_time()
            steps[name]()
            taken[name].append(1e3 * (time.thread_time() - start))
    first = next(iter(taken.values()))
    return {
        name: {"ms": quartiles(values), "ratio": quartiles([a / b for a, b in zip(values, first, strict=True)])}
        for name, values in taken.items()
    }


def time_steps(make: Callable[[], list[nn.Parameter]], rounds: int) -> dict[str, Any]:
    def ready(build: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> torch.optim.Optimizer:
        torch.manual_seed(0)
        params = make()
        for p in params:
            p.grad = torch.randn_like(p) * 1e-3
        return build(params)

    optimizers = {
        "torch AdamW, fused": ready(fused),
        "the same again (control)": ready(fused),
        "torch AdamW, default": ready(lambda params: torch.optim.AdamW(params, lr=1e-3)),
        "AdamW8bit, compiled": ready(lambda params: AdamW8bit(params, lr=1e-3)),
        "AdamW8bit, not compiled": ready(lambda params: AdamW8bit(params, lr=1e-3, compile=False)),
    }
    try:
        optimizers["bitsandbytes AdamW8bit"] = ready(
            lambda params: eight_bit(torch.optim.AdamW(params, lr=1e-3), backend="bitsandbytes")
        )
    except ImportError:
        pass
    result = paired({name: optimizer.step for name, optimizer in optimizers.items()}, rounds)
    for name, optimizer in optimizers.items():
        params = [p for group in optimizer.param_groups for p in group["params"]]
        result[name]["bytes a parameter"] = state_bytes(optimizer) / sum(p.numel() for p in params)
    return result


def follow(text: Tensor, steps: int) -> dict[str, float]:
    """Relative error of each optimizer's update on the gradients of one 32-bit run, mean of the last 20 steps."""
    torch.manual_seed(0)
    model = GPT(128, 3)
    params = [p for name, p in model.named_parameters() if p.numel() >= 4096 and "emb" not in name]
    generator = torch.Generator().manual_seed(0)
    driver = fused(model.parameters())
    shadows = {}
    for name, build in {
        "32 bits": lambda ps: torch.optim.AdamW(ps, lr=1.0, weight_decay=0.0, fused=True),
        "AdamW8bit": lambda ps: AdamW8bit(ps, lr=1.0, weight_decay=0.0),
        "AdamW8bit, rounded to the nearest code": lambda ps: Nearest(ps, lr=1.0, weight_decay=0.0, compile=False),
        "bitsandbytes AdamW8bit": lambda ps: eight_bit(
            torch.optim.AdamW(ps, lr=1.0, weight_decay=0.0), backend="bitsandbytes"
        ),
    }.items():
        try:
            shadows[name] = build([nn.Parameter(torch.zeros_like(p)) for p in params])
        except ImportError:
            pass
    errors: dict[str, list[float]] = {name: [] for name in shadows}
    for step in range(steps):
        driver.zero_grad()
        model(batch(text, generator)).backward()
        moves = {}
        for name, shadow in shadows.items():
            mine = shadow.param_groups[0]["params"]
            for p, source in zip(mine, params, strict=True):
                p.data.zero_()
                p.grad = source.grad.clone()
            shadow.step()
            moves[name] = torch.cat([p.detach().flatten() for p in mine])
        if step >= steps - 20:
            exact = moves["32 bits"]
            for name, move in moves.items():
                errors[name].append(float((move - exact).norm() / exact.norm()))
        driver.step()
    return {name: statistics.mean(values) for name, values in errors.items() if name != "32 bits"}


class Nearest(AdamW8bit):
    """AdamW8bit without its sequence of thresholds, to show what that does."""

    def _step_8bit(self, p: Tensor, state: dict, group: dict, knobs: dict) -> None:
        from eke_adam8bit import optimizer as ours

        key = (id(group), int(state["step"]) + 1, p.device)
        if key not in knobs:
            knobs[key] = ours._knobs(key[1], group)
            knobs[key][: ours.BLOCK] = 0
        super()._step_8bit(p, state, group, knobs)


def final_losses(train: Tensor, held: Tensor, seeds: int, steps: int) -> dict[str, list[float]]:
    def run(seed: int, eight: bool) -> float:
        torch.manual_seed(seed)
        model = GPT(128, 3)
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1, fused=True)
        if eight:
            optimizer = eight_bit(optimizer, keep_32bit=embeddings(model))
        generator = torch.Generator().manual_seed(seed)
        for step in range(steps):
            rate = min((step + 1) / 20, 1.0) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * rate
            optimizer.zero_grad()
            model(batch(train, generator)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        generator.manual_seed(99)
        with torch.no_grad():
            return statistics.mean(float(model(batch(held, generator, 32))) for _ in range(8))

    return {name: [run(s, eight) for s in range(seeds)] for name, eight in (("32 bits", False), ("8 bits", True))}


def headline(result: dict[str, Any]) -> str:
    """What the table of techniques says."""
    (_, large), (title, small) = reversed(result["steps"].items())
    ours = "AdamW8bit, compiled"
    last = {name: statistics.mean(losses) for name, losses in result["loss"].items()}
    return (
        f"{large[ours]['bytes a parameter']:.2f} bytes of state a parameter in place of 8; a step takes "
        f"{large[ours]['ratio']['median']:.1f} to {small[ours]['ratio']['median']:.1f} times that of fused AdamW on a "
        f"CPU (bitsandbytes: {small['bitsandbytes AdamW8bit']['ratio']['median']:.0f}); loss "
        f"{last['8 bits']:.3f} against {last['32 bits']:.3f}"
    )


def show_times(rounds: int) -> dict[str, Any]:
    lists = {
        "GPT, width 256, 6 blocks, 4.9 M parameters in 76 tensors": lambda: list(GPT(256, 6).parameters()),
        "one tensor of 10.5 M parameters": lambda: [nn.Parameter(torch.randn(2560, 4096))],
    }
    result = {}
    for title, make in lists.items():
        result[title] = rows = time_steps(make, rounds)
        print(f"\n| {title} | state, bytes a parameter | ms a step | ratio to fused |\n| --- | --- | --- | --- |")
        for name, row in rows.items():
            ratio = "{median:.2f} [{low:.2f}, {high:.2f}]".format(**row["ratio"])
            print(f"| {name} | {row['bytes a parameter']:.3f} | {row['ms']['median']:.2f} | {ratio} |", flush=True)
    return result


def show_error(train: Tensor, steps: int) -> dict[str, float]:
    result = follow(train, steps)
    print(f"\n| after {steps} steps | error of the update |\n| --- | --- |")
    for name, error in result.items():
        print(f"| {name} | {100 * error:.1f} % |", flush=True)
    return result


def show_loss(train: Tensor, held: Tensor, seeds: int, steps: int) -> dict[str, list[float]]:
    result = final_losses(train, held, seeds, steps)
    columns = " | ".join(f"seed {seed}" for seed in range(seeds))
    print(f"\n| validation loss after {steps} steps, nats a byte | {columns} |\n{'| --- ' * (seeds + 1)}|")
    for name, losses in result.items():
        print(f"| {name} | " + " | ".join(f"{loss:.4f}" for loss in losses) + " |", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--only", nargs="+", choices=["times", "error", "loss"], default=["times", "error", "loss"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="a few rounds and steps, to see that it runs")
    given = parser.parse_args()
    if given.quick:
        given.seeds, given.steps, given.rounds = 1, 30, 5
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    if given.json and given.json.exists():
        result = json.loads(given.json.read_text())
    result["machine"] = {"processor": platform.machine(), "threads": 1, "torch": torch.__version__}
    _, how = compiled("cpu", torch.float32, False)
    print(f"the step, one graph for all shapes: {how}", flush=True)
    if "times" in given.only:
        result["compile"] = how
        result["steps"] = show_times(given.rounds)
    train, held = standard_library()
    if "error" in given.only:
        result["update error"] = show_error(train, given.steps)
    if "loss" in given.only:
        result["loss"] = show_loss(train, held, given.seeds, given.steps)
    if given.json:
        if {"steps", "loss"} <= set(result):
            result["headline"] = headline(result)
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
