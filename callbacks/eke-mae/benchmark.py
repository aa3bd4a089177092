"""Measure MAE: its step against one that encodes all patches, and what pretraining gives beside training from scratch.

python benchmark.py --size cpu --out ../../benchmarks/cpu-2core
"""

import sys

import eke
import torch
from eke_bench import Benchmark, Timing, main_of
from eke_bench.steps import step, vision_model
from eke_mae import MAE


def steps(size):
    """Pretraining steps of a Vision Transformer on 196 patches of real images: encoder, two blocks of decoder at half
    of its width on all patches, and optimizer."""
    model, batch = vision_model(size)
    mae, images = MAE(0.75), batch[0]
    mae.alter_model(eke.Run(mae, None, model))
    model.to(images.device)

    def loss(visible):
        order = torch.rand(len(images), 196, device=images.device).argsort(1)
        target, predicted = mae._mae(images, order, order[:, :visible], (14, 14))
        return (predicted - target).square().mean(-1).gather(1, order[:, 49:]).mean()

    return {
        "all patches encoded": step(model, batch, lambda: loss(196)),
        "a quarter of the patches encoded": step(model, batch, lambda: loss(49)),
    }


STEP = Timing(
    "mae",
    "step on visible patches",
    steps,
    headline="a pretraining step at 75 % hidden, decoder included, takes {1:.2f} of one that encodes all patches",
)
# Beside an encoder of two blocks, two blocks of decoder with four heads would cost more than masking saves.
LIGHT = {"decoder_depth": 1, "decoder_heads": 1}
PRETRAIN = Benchmark(
    "mae",
    variants={
        "a third of the steps": {"mae": {"duration": 0.33, **LIGHT}},
        "half": {"mae": {"duration": 0.5, **LIGHT}},
    },
    workload="vit-fine",
)

if __name__ == "__main__":
    sys.exit(main_of(STEP, PRETRAIN))
