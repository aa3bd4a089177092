"""Compare ways to grow a byte-level GPT from 4 to 8 blocks, with the controls that growth has to beat.

    python benchmark.py [--steps 2400] [--seeds 1] [--only stack random ...] [--json FILE] [--quick]

Every run's learning rate decays to zero inside its own budget. Cost counts a step of the full model as 1 and a step
of the shallow one as its measured share, so that the load of the machine does not enter. With ``--json``, runs that
the file has already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import statistics
import sysconfig
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from eke.seams import gate
from eke_stacking import Stacking
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

BLOCKS, WIDTH, HEADS, LENGTH, BATCH = 8, 64, 4, 128, 8
GROW_AT = 0.3

# Name to blocks, how the number of steps follows from the budget, and the arguments of Stacking.
RUNS: dict[str, tuple[int, str, dict[str, Any] | None]] = {
    "8 blocks": (BLOCKS, "all", None),
    "8 blocks, at the cost of growth": (BLOCKS, "cost of growth", None),
    "4 blocks": (BLOCKS // 2, "all", None),
    "4 blocks, at the cost of growth": (BLOCKS // 2, "cost of growth", None),
    "stack": (BLOCKS, "all", {}),
    "interleave": (BLOCKS, "all", {"operator": "interleave"}),
    "identity": (BLOCKS, "all", {"operator": "identity"}),
    "random": (BLOCKS, "all", {"operator": "random"}),
    "stack, new state reset": (BLOCKS, "all", {"optimizer_state": "reset_new"}),
}


class Block(nn.Module):
    """Pre-norm Transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(WIDTH, 3 * WIDTH), "proj": nn.Linear(WIDTH, WIDTH)})
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:  # (batch, length, width)
        batch, length, width = x.shape
        q, k, v = self.attn["qkv"](self.norm1(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["proj"](attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(LightningModule):
    """Byte-level language model; its learning rate warms up for 5 % of ``steps`` and is zero at their end."""

    def __init__(self, blocks: int, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.embed, self.position = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def loss(self, windows: Tensor) -> Tensor:
        inputs, targets = windows[:, :-1], windows[:, 1:]
        x = self.embed(inputs) + self.position.weight
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())

    def training_step(self, windows: Tensor, batch_idx: int) -> Tensor:
        return self.loss(windows)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.1, fused=True)
        warm_up = max(1, self.steps // 20)

        def share(step: int) -> float:
            if step < warm_up:
                return (step + 1) / warm_up
            return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, self.steps - warm_up)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Windows(Dataset):
    """Random stretches of a text, the same for every run of one seed."""

    def __init__(self, text: Tensor, size: int, seed: int) -> None:
        self.text = text
        self.starts = torch.randint(len(text) - LENGTH, (size,), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Tensor:
        start = int(self.starts[index])
        return self.text[start : start + LENGTH + 1].long()


def standard_library() -> tuple[Tensor, Tensor]:
    """Sources of Python's standard library as bytes: every twentieth file is for validation."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    files = sorted(path for path in root.rglob("*.py") if not set(path.relative_to(root).parts) & skipped)
    parts = [b"".join(f.read_bytes() for i, f in enumerate(files) if (i % 20 == 7) is held) for held in (False, True)]
    return tuple(torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts)


def step_share(rounds: int) -> dict[str, float]:
    """Processor time of a step with half of the blocks dormant over that of a full one, interleaved: quartiles."""
    model = GPT(BLOCKS, 1000)
    optimizer = model.configure_optimizers()["optimizer"]
    windows = torch.randint(256, (BATCH, LENGTH + 1))
    gate.attach(model.blocks, "benchmark")

    def step(blocks: int) -> float:
        for i, block in enumerate(model.blocks):
            gate.put(block, "benchmark", *([gate.Skip()] if i >= blocks else []))
        start = time.process_time()
        optimizer.zero_grad()
        model.loss(windows).backward()
        optimizer.step()
        return time.process_time() - start

    ratios = [step(BLOCKS // 2) / step(BLOCKS) for _ in range(rounds + 3)][3:]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"low": low, "median": middle, "high": high}


def train(blocks: int, steps: int, stacking: dict[str, Any] | None, seed: int, texts: tuple[Tensor, Tensor]) -> float:
    """Loss on held-out text, nats a byte, after ``steps`` steps."""
    seed_everything(seed, verbose=False)
    model = GPT(blocks, steps)
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=[] if stacking is None else [Stacking([GROW_AT], **stacking)],
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(Windows(texts[0], steps * BATCH, seed), batch_size=BATCH))
    held = DataLoader(Windows(texts[1], 512, 0), batch_size=32)
    with torch.no_grad():
        return statistics.fmean(model.eval().loss(windows).item() for windows in held)


def budget(name: str, steps: int, share: float) -> tuple[int, float]:
    """Steps of a run, and its cost in steps of the full model."""
    blocks, rule, stacking = RUNS[name]
    shallow = math.ceil(GROW_AT * steps)
    growth = shallow * share + steps - shallow
    per_step = 1.0 if blocks == BLOCKS else share
    own = steps if rule == "all" else round(growth / per_step)
    return own, growth if stacking is not None else own * per_step


def headline(result: dict[str, Any]) -> str:
    """One line: what copying gained over the controls at the same cost."""
    loss = {name: statistics.fmean(run["losses"].values()) for name, run in result["runs"].items()}
    seeds = min(len(run["losses"]) for run in result["runs"].values())
    cost = result["runs"]["stack"]["cost"] / result["steps"]
    return (
        f"{result['steps']} steps, {seeds} seed{'s' * (seeds > 1)}: loss {loss['stack']:.3f} at {cost:.2f} of the cost "
        f"of 8 blocks ({loss['8 blocks']:.3f}); at that same cost 8 blocks reach "
        f"{loss['8 blocks, at the cost of growth']:.3f}, 4 blocks {loss['4 blocks, at the cost of growth']:.3f}, "
        f"growth with random blocks {loss['random']:.3f}"
    )


def table(result: dict[str, Any]) -> str:
    rows = ["| run | steps | cost | loss, nats a byte |", "| --- | --- | --- | --- |"]
    for name, run in result["runs"].items():
        losses = list(run["losses"].values())
        spread = f" ({', '.join(f'{loss:.3f}' for loss in losses)})" if len(losses) > 1 else ""
        cost = run["cost"] / result["steps"]
        rows.append(f"| {name} | {run['steps']} | {cost:.2f} | {statistics.fmean(losses):.3f}{spread} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2400, help="of the full run")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS), metavar="RUN")
    parser.add_argument("--json", type=Path, help="read what it has, add the rest")
    parser.add_argument("--quick", action="store_true", help="20 steps: shows that it runs, says nothing else")
    options = parser.parse_args()
    steps = 20 if options.quick else options.steps
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    result = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    if result.get("steps") != steps:
        result = {"steps": steps, "runs": {}}
    result["machine"] = {"cpu": platform.machine(), "threads": 1, "torch": torch.__version__}
    if "step_share" not in result:
        result["step_share"] = step_share(3 if options.quick else 60)
    share = result["step_share"]["median"]
    print(f"A step with 4 of 8 blocks takes {share:.3f} of a full one ({result['step_share']}).", flush=True)
    texts = standard_library()
    for seed in range(options.seeds):
        for name in options.only:
            own, cost = budget(name, steps, share)
            run = result["runs"].setdefault(name, {"steps": own, "cost": cost, "losses": {}})
            if str(seed) in run["losses"]:
                continue
            start = time.process_time()
            blocks, _, stacking = RUNS[name]
            run["losses"][str(seed)] = train(blocks, own, stacking, seed, texts)
            spent = time.process_time() - start
            print(f"{name}, seed {seed}: {run['losses'][str(seed)]:.4f} ({spent:.0f} s)", flush=True)
            if options.json:
                options.json.write_text(json.dumps(result, indent=1) + "\n")
    print("\n" + table(result))
    if set(result["runs"]) == set(RUNS):
        result["headline"] = headline(result)
        print("\n" + result["headline"])
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
