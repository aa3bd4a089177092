"""Training steps to time: of one model on one batch, as it is and with its blocks intercepted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from eke.seams import interceptor
from torch import nn

from eke_bench.workloads import Learner, load

Actions = Callable[[int, nn.Module], Sequence[interceptor.Action]]
OWNER = "benchmark"


def language_model(size: str, blocks: int, workload: str = "gpt") -> tuple[Learner, Any]:
    """A byte-level GPT of this depth, on a GPU at size ``"gpu"``, and a batch for it."""
    made, device = load(workload, size), device_of(size)
    torch.manual_seed(0)
    model = made.model({"blocks": blocks, "width": {"smoke": 32, "cpu": 128, "gpu": 512}[size]}, 1e-4, 10**9)
    return model.to(device), next(iter(made.train_loader(seed=0))).to(device)


def vision_model(size: str, blocks: int = 6) -> tuple[Learner, list[torch.Tensor]]:
    """A Vision Transformer of this depth on real images in 196 patches, 16 of them or, on a GPU, 256, with classes."""
    from eke_bench.workloads.vit import ConvViT, digits

    device = device_of(size)
    torch.manual_seed(0)
    model = ConvViT(blocks, {"smoke": 32, "cpu": 128, "gpu": 768}[size], patch=2, lr=1e-4, steps=10**9)
    count = 256 if size == "gpu" else 16
    return model.to(device), [part[:count].to(device) for part in digits()[:2]]


def step(model: Learner, batch: Any, loss: Callable[[], torch.Tensor] | None = None) -> Callable[[], None]:
    """A training step, optimizer included: of the model's own loss, or of another one of the same model."""
    optimizer = model.configure_optimizers()["optimizer"]
    loss = loss or (lambda: model.loss(batch))

    def run() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def intercepted(model: Learner, batch: Any, ways: Mapping[str, Actions]) -> dict[str, Callable[[], None]]:
    """Training steps of one model, label to step.

    Args:
        model: Its blocks are ``model.blocks``.
        batch: Of every step.
        ways: Label to what is done to the blocks: from the number of a block, and the block, to its actions.
    """
    interceptor.attach(model.blocks, OWNER)
    plain = step(model, batch)

    def run(actions: Actions) -> None:
        for number, block in enumerate(model.blocks):
            interceptor.put(block, OWNER, *actions(number, block))
        plain()

    return {label: (lambda actions=actions: run(actions)) for label, actions in ways.items()}


def untouched(number: int, block: nn.Module) -> Sequence[interceptor.Action]:
    """The way of the model as it is."""
    return ()


def device_of(size: str) -> torch.device:
    return torch.device("cuda" if size == "gpu" else "cpu")
