"""What predicted sparsity keeps of a trained model's attention, and what it costs in loss.

python predicted.py --size cpu --out ../../benchmarks/cpu-2core

A byte-level GPT is trained at length 512 with all pairs. Then each prediction takes over without further training: it
calibrates on batches of the training data, and is measured on held-out ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from eke_attention import A3, DOTA, ELSA, Attention, Pattern, Sanger, SlidingWindow, ViTCoD, pairs, recall
from eke_attention.kernels import Call, sdpa
from eke_attention.sites import Site, install
from eke_bench.training import train
from eke_bench.workloads import load
from torch import Tensor
from torch.nn import functional as F

CALIBRATION, MEASURED, BLOCK = 100, 4, 16
PREDICTIONS: dict[str, Callable[[], Pattern]] = {
    "Sanger, 0.002": Sanger,
    "Sanger, 0.02": lambda: Sanger(0.02),
    "DOTA, a tenth": lambda: DOTA(0.1, calibrate=CALIBRATION),
    "DOTA, a third": lambda: DOTA(1 / 3, calibrate=CALIBRATION),
    "ELSA, p = 1": lambda: ELSA(1.0),
    "ELSA, p = 4": lambda: ELSA(4.0),
    "A3, conservative": A3,
    "A3, aggressive": lambda: A3(1 / 8, 10),
    "ViTCoD, 0.5": lambda: ViTCoD(0.5, collect=50),
    "ViTCoD, 0.9": lambda: ViTCoD(0.9, collect=50),
    "window of 51, unpredicted": lambda: SlidingWindow(51),
}


def trained(size: str) -> tuple[torch.nn.Module, list[Tensor], list[Tensor]]:
    workload = load("gpt-long", size)
    # The deep model, but at size "gpu", where that would take hours.
    shape = workload.size.deep if size == "cpu" else workload.size.shape
    module = train(workload, shape, workload.size.lrs[-1], workload.size.steps)
    batches = [one for _, one in zip(range(CALIBRATION + 1), workload.train_loader(1), strict=False)]
    return module.eval(), batches, [one for _, one in zip(range(MEASURED), workload.val_loader(), strict=False)]


def loss(module: torch.nn.Module, batches: list[Tensor]) -> float:
    with torch.no_grad():
        return statistics.fmean(
            float(F.cross_entropy(module(one[:, :-1]).flatten(0, 1).float(), one[:, 1:].flatten())) for one in batches
        )


def measured(module: torch.nn.Module, pattern: Pattern, fit: list[Tensor], held_out: list[Tensor]) -> dict[str, float]:
    plugin = Attention(pattern, "masked")
    plugin._used = "masked"
    rows: list[tuple[float, ...]] = []
    calibrating = True

    def attend(site: Site, call: Call) -> Tensor:
        if calibrating:
            pattern.mod(call, site.layer, True)
            return sdpa(call)
        given = dict(site.layer)
        kept = pairs(pattern, call, site.layer)
        free = pairs(SlidingWindow(10**9), call, {})
        tiles = kept.unflatten(3, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).any(5).any(3)
        all_tiles = free.unflatten(3, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).any(5).any(3)
        top, weight = recall(call, kept)
        rows.append((float(kept.sum() / free.sum()), float(tiles.sum() / all_tiles.sum()), top, weight))
        site.layer.update(given)
        return plugin._attend(site, call)

    sites, _ = install(module, attend)
    try:
        for site in sites:
            site.wants_input = pattern.wants_input
        for step, batch in enumerate(fit):
            with torch.no_grad():
                module(batch[:, :-1])
            pattern.after_step({site.path: site.layer for site in sites}, step, lambda tensor: tensor)
            for site in sites:
                site.layer.pop("input", None)
        calibrating = False
        found = loss(module, held_out)
    finally:
        for site in sites:
            site.remove()
    names = ("pairs", "blocks", "recall", "weight")
    return {
        "loss": found,
        **{name: statistics.fmean(part) for name, part in zip(names, zip(*rows, strict=True), strict=True)},
    }


def show(found: dict[str, dict[str, float]]) -> None:
    print("| | pairs kept | 16 by 16 blocks with any | of each query's top tenth | weight of attention | nats a byte |")
    print("| --- | --- | --- | --- | --- | --- |")
    for label, one in found.items():
        shares = " | ".join(f"{one[name]:.2f}" for name in ("pairs", "blocks", "recall", "weight"))
        print(f"| {label} | {shares} | {one['loss']:.3f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="smoke", choices=("smoke", "cpu", "gpu"))
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--show", action="store_true", help="print what is stored")
    given = parser.parse_args()
    file = given.out / f"attention-predicted-{given.size}.json"
    if not given.show:
        module, fit, held_out = trained(given.size)
        everything = {"pairs": 1.0, "blocks": 1.0, "recall": 1.0, "weight": 1.0, "loss": loss(module, held_out)}
        found = {"all pairs": everything}
        for label, build in PREDICTIONS.items():
            pattern = build()
            learns = not isinstance(pattern, (A3, SlidingWindow))
            found[label] = measured(module, pattern, fit if learns else [], held_out)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"rows": found, "torch": torch.__version__}, indent=1))
    show(json.loads(file.read_text())["rows"])
