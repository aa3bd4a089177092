"""Measure FP8: whole runs of a byte-level GPT beside bf16 and float32; on a GPU, a wide one's step and memory as well.

python benchmark.py --size cpu --out ../../benchmarks/cpu-2core

On a CPU the arithmetic is emulated: losses are those of the recipe, and times say nothing. On a GPU it is the back end
named in the table. Learning rate, schedule and data are the same for all runs of a seed.
"""

import statistics
import sys
import time
from functools import partial

import torch
from eke_bench import Runs, main_of
from eke_bench.stats import counted
from eke_bench.training import train, validate
from eke_bench.workloads import load
from eke_fp8 import FP8

WIDE = {"blocks": 4, "width": 2048}  # of the GPU's step: products that FP8 is for
RATE = {"smoke": 0.004, "cpu": 0.004, "gpu": 0.001}
EMULATED = ("tensorwise", "delayed", "rowwise", "block", "mx", "s2fp8", "chunked")
ONCE = ("mx", "s2fp8", "chunked", "stochastic")  # slow to emulate, or of historical interest: one seed
REAL = {"te": ("tensorwise", "delayed", "block"), "torchao": ("tensorwise", "rowwise")}


def kinds(size):
    """Label to what makes the run's FP8; None for a run without."""
    found = {"float32": None, "bf16": None, "bf16, other seed": None}
    if size == "gpu":
        for backend, recipes in REAL.items():
            found |= {f"FP8 {recipe}, {backend}": partial(FP8, recipe, backend=backend) for recipe in recipes}
        return found
    found |= {f"FP8 {recipe}": partial(FP8, recipe, backend="emulation") for recipe in EMULATED}
    return {**found, "FP8 tensorwise, stochastic gradients": partial(FP8, backend="emulation", stochastic=True)}


def run(size, label, seed, steps=None, shape=None):
    workload, build = load("gpt", size), kinds(size)[label]
    steps = steps or workload.size.steps
    precision = "32-true" if label == "float32" else "bf16-mixed"
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    model = train(
        workload,
        shape or workload.size.shape,
        RATE[size],
        steps,
        seed + 100 if "other seed" in label else seed,
        callbacks=[build()] if build else [],
        precision=precision,
    )
    spent = time.perf_counter() - begun
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else 0.0
    loss = validate(model, workload, precision=precision)["val_loss"]
    return {"val_loss": loss, "step_ms": 1000 * spent / steps, "peak_mib": peak, "torch": torch.__version__}


def plan(size, seeds):
    found = {}
    for seed in range(seeds):
        for label in kinds(size):
            if not seed or size == "gpu" or not any(word in label for word in ONCE):
                found[f"{label} | {seed}"] = partial(run, size, label, seed)
        if size == "gpu":
            found |= {f"wide | {label} | {seed}": partial(run, size, label, seed, 60, WIDE) for label in kinds(size)}
    return found


def of(found, label):
    """Seed to run."""
    return {seed: one for name, one in found.items() for kind, _, seed in [name.rpartition(" | ")] if kind == label}


def headline(found, size):
    def losses(label):
        return [one["val_loss"] for one in of(found, label).values()]

    first = next(label for label in kinds(size) if label.startswith("FP8"))
    ours, plain = losses(first), losses("bf16")
    apart = statistics.fmean(a - b for a, b in zip(ours, plain, strict=True))
    noise = max(abs(a - b) for a, b in zip(losses("bf16, other seed"), plain, strict=True))
    return (
        f"{first}: {apart:+.4f} nats a byte from bf16 with equal seeds, two seeds of bf16 up to {noise:.4f} apart "
        f"(gpt, {counted(len(ours), 'seed')}{', emulated: nothing is saved on a CPU' if size != 'gpu' else ''})"
    )


def tables(found, size):
    rows = [["run", "seeds", "nats a byte, least to most", "from bf16, equal seeds", "ms a step"]]
    wide = [[f"{WIDE['blocks']} blocks of width {WIDE['width']}", "ms a step", "peak MiB"]]
    for label in kinds(size):
        runs = of(found, label)
        if runs:
            values = [one["val_loss"] for one in runs.values()]
            apart = [one["val_loss"] - found[f"bf16 | {seed}"]["val_loss"] for seed, one in runs.items()]
            spread = f"{statistics.fmean(values):.4f}, {min(values):.4f} to {max(values):.4f}"
            took = statistics.median(one["step_ms"] for one in runs.values())
            rows.append([label, str(len(runs)), spread, f"{min(apart):+.4f} to {max(apart):+.4f}", f"{took:.1f}"])
        runs = of(found, f"wide | {label}").values()
        if runs:
            took, peak = (statistics.median(one[name] for one in runs) for name in ("step_ms", "peak_mib"))
            wide.append([label, f"{took:.1f}", f"{peak:,.0f}"])
    return [rows, wide] if len(wide) > 1 else [rows]


if __name__ == "__main__":
    sys.exit(main_of(Runs("fp8", "gpt", plan, tables, headline)))
