"""Measure FP8: whole runs of a byte-level GPT beside bf16 and float32; on a GPU, a wide one's step and memory as well.

python benchmark.py --size cpu --out ../../benchmarks/cpu-2core

On a CPU the arithmetic is emulated: losses are those of the recipe, and times say nothing. On a GPU it is the back end
named in the table. Learning rate, schedule and data are the same for all runs of a seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from eke_bench.workloads import load
from eke_fp8 import FP8
from lightning.pytorch import Trainer, seed_everything

SHAPE = {"smoke": {"blocks": 2, "width": 32}, "cpu": {"blocks": 2, "width": 64}, "gpu": {"blocks": 8, "width": 512}}
WIDE = {"blocks": 4, "width": 2048}  # of the GPU's step: products that FP8 is for
RATE = {"smoke": 0.004, "cpu": 0.004, "gpu": 0.001}
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
EMULATED = ("tensorwise", "delayed", "rowwise", "block", "mx", "s2fp8", "chunked")
ONCE = ("mx", "s2fp8", "chunked", "stochastic")  # slow to emulate, or of historical interest: one seed
REAL = {"te": ("tensorwise", "delayed", "block"), "torchao": ("tensorwise", "rowwise")}


def kinds(size: str) -> dict[str, tuple[str, Callable[[], list]]]:
    """The Trainer's precision and callbacks, by label."""
    found = {"float32": ("32-true", list), "bf16": ("bf16-mixed", list), "bf16, other seed": ("bf16-mixed", list)}
    if size != "gpu":
        for recipe in EMULATED:
            found[f"FP8 {recipe}"] = ("bf16-mixed", lambda recipe=recipe: [FP8(recipe, backend="emulation")])
        found["FP8 tensorwise, stochastic gradients"] = (
            "bf16-mixed",
            lambda: [FP8(backend="emulation", stochastic=True)],
        )
        return found
    for backend, recipes in REAL.items():
        for recipe in recipes:
            found[f"FP8 {recipe}, {backend}"] = (
                "bf16-mixed",
                lambda recipe=recipe, backend=backend: [FP8(recipe, backend=backend)],
            )
    return found


def train(size: str, label: str, seed: int, steps: int | None = None, shape: dict | None = None) -> dict[str, float]:
    workload = load("gpt", size)
    precision, callbacks = kinds(size)[label]
    steps = steps or workload.size.steps
    own = seed + 100 if "other seed" in label else seed
    seed_everything(own, verbose=False)
    module = workload.model(shape or SHAPE[size], RATE[size], steps)
    trainer = Trainer(
        max_steps=steps, precision=precision, callbacks=callbacks(), limit_val_batches=0, devices=1, **QUIET
    )
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    trainer.fit(module, workload.train_loader(own))
    spent = time.perf_counter() - begun
    loss = Trainer(precision=precision, devices=1, **QUIET).validate(module, workload.val_loader(), verbose=False)
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else 0.0
    return {"val_loss": float(loss[0]["val_loss"]), "step_ms": 1000 * spent / steps, "peak_mib": peak}


def headline(found: dict[str, dict], size: str) -> str:
    def losses(label: str) -> list[float]:
        return [one["val_loss"] for name, one in found.items() if name.rpartition(" | ")[0] == label]

    first = next(label for label in kinds(size) if label.startswith("FP8"))
    ours, plain = losses(first), losses("bf16")
    apart = statistics.fmean(a - b for a, b in zip(ours, plain, strict=True))
    noise = max(abs(a - b) for a, b in zip(losses("bf16, other seed"), plain, strict=True))
    return (
        f"{first}: {apart:+.4f} nats a byte from bf16 with equal seeds, two seeds of bf16 up to {noise:.4f} apart "
        f"(gpt, {len(ours)} seeds{', emulated: nothing is saved on a CPU' if size != 'gpu' else ''})"
    )


def show(found: dict[str, dict], size: str) -> None:
    print("| run | seeds | nats a byte, least to most | from bf16, equal seeds | ms a step |")
    print("| --- | --- | --- | --- | --- |")
    for label in kinds(size):
        runs = {name.rpartition(" | ")[2]: one for name, one in found.items() if name.rpartition(" | ")[0] == label}
        values = [one["val_loss"] for one in runs.values()]
        if values:
            apart = [one["val_loss"] - found[f"bf16 | {seed}"]["val_loss"] for seed, one in runs.items()]
            spread = f"{statistics.fmean(values):.4f}, {min(values):.4f} to {max(values):.4f}"
            took = statistics.median(one["step_ms"] for one in runs.values())
            print(f"| {label} | {len(runs)} | {spread} | {min(apart):+.4f} to {max(apart):+.4f} | {took:.1f} |")
    wide = [label for label in kinds(size) if f"wide | {label} | 0" in found]
    if wide:
        print(f"\n| {WIDE['blocks']} blocks of width {WIDE['width']} | ms a step | peak MiB |\n| --- | --- | --- |")
    for label in wide:
        runs = [one for name, one in found.items() if name.rpartition(" | ")[0] == f"wide | {label}"]
        took, peak = (statistics.median(one[of] for one in runs) for of in ("step_ms", "peak_mib"))
        print(f"| {label} | {took:.1f} | {peak:,.0f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="smoke", choices=tuple(SHAPE))
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--show", action="store_true", help="print what is stored")
    given = parser.parse_args()
    file = given.out / f"fp8-gpt-{given.size}.json"
    found = json.loads(file.read_text())["runs"] if file.exists() else {}
    for seed in range(0 if given.show else given.seeds):
        for label in kinds(given.size):
            once = given.size != "gpu" and any(word in label for word in ONCE)
            if f"{label} | {seed}" not in found and not (once and seed):
                found[f"{label} | {seed}"] = {**train(given.size, label, seed), "torch": torch.__version__}
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps({"runs": found}, indent=1))
        if given.size == "gpu":
            for label in kinds("gpu"):
                if f"wide | {label} | {seed}" not in found:
                    found[f"wide | {label} | {seed}"] = train("gpu", label, seed, 60, WIDE)
                    file.write_text(json.dumps({"runs": found}, indent=1))
    if found and not given.show:
        file.write_text(json.dumps({"runs": found, "headline": headline(found, given.size)}, indent=1))
    show(found, given.size)
