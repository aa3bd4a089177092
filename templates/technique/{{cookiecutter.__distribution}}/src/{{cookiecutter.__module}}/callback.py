"""{{ cookiecutter.summary }}.

Source: {{ cookiecutter.paper }}.

The method here is the template's example: gradients grow from a small share of themselves to all of themselves
over the first steps. Put yours in its place: functions that do it, and a class that calls them at the right moment.
"""

from __future__ import annotations

from collections.abc import Iterable

from eke import ArgumentError, Run, Technique, TechniqueCallback
from torch import nn
from torch.optim import Optimizer


def share(step: int, warmup_steps: int) -> float:
    """Share of the gradient that step ``step`` (0 is the first) keeps: min(1, (step + 1) / warmup_steps)."""
    return min(1.0, (step + 1) / warmup_steps)


def scale_gradients(weights: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply the gradient of each weight that has one by ``factor``, in place."""
    for weight in weights:
        if weight.grad is not None:
            weight.grad.mul_(factor)


class {{ cookiecutter.class_name }}(TechniqueCallback):
    """{{ cookiecutter.summary }}.

    Example::

        trainer = Trainer(callbacks=[{{ cookiecutter.class_name }}(warmup_steps=100)])

    Args:
        warmup_steps: Optimizer steps until gradients are left as they are. 1 never changes one.

    Raises:
        ValueError: ``warmup_steps`` is below 1.
    """

    technique = Technique(
        name="{{ cookiecutter.__entry }}",
        kind="{{ cookiecutter.kind }}",
        factory="{{ cookiecutter.__module }}:{{ cookiecutter.class_name }}",
        paper="{{ cookiecutter.paper }}",
        does="{{ cookiecutter.summary }}",
        effects=("changes gradients",),
        exactness="model-changing",
    )

    def __init__(self, warmup_steps: int = 100) -> None:
        super().__init__()
        if warmup_steps < 1:
            raise ArgumentError(f"warmup_steps={warmup_steps} is no number of steps. Give 1 or more.")
        self.warmup_steps = warmup_steps

    def before_optimizer_step(self, run: Run, optimizer: Optimizer) -> None:
        # Here and not after backward: once per optimizer step under accumulation, and before clipping.
        # Progress is saved and resumed by eke; what a technique counts itself belongs in state_dict().
        factor = share(run.progress.steps, self.warmup_steps)
        if factor < 1:
            scale_gradients(run.module.parameters(), factor)
