"""{{ cookiecutter.summary }}.

Source: {{ cookiecutter.paper }}.

The method here is the template's example: the optimizer steps through torch's fused kernel in place of a loop over
weights. Put yours in its place: functions that swap a part, and a class that calls them at the right moment.
"""

from __future__ import annotations

import warnings

from eke import NoEffectWarning, Run, Technique, TechniqueCallback
from torch.optim import Optimizer


def fuse(optimizer: Optimizer) -> bool:
    """Let a torch optimizer step with its fused kernel; False if it has none."""
    if "fused" not in optimizer.defaults:
        return False
    for group in optimizer.param_groups:
        group.update(fused=True, foreach=False)  # read at each step; torch allows only one of the two
    return True


class {{ cookiecutter.class_name }}(TechniqueCallback):
    """{{ cookiecutter.summary }}.

    Example::

        trainer = Trainer(callbacks=[{{ cookiecutter.class_name }}()])

    Warns:
        NoEffectWarning: the optimizer has no fused kernel.
    """

    technique = Technique(
        name="{{ cookiecutter.__entry }}",
        kind="{{ cookiecutter.kind }}",
        factory="{{ cookiecutter.__module }}:{{ cookiecutter.class_name }}",
        paper="{{ cookiecutter.paper }}",
        does="{{ cookiecutter.summary }}",
        effects=("changes optimizer",),
        exactness="reordered sums",
    )

    def alter_optimizer(self, run: Run, optimizer: Optimizer) -> Optimizer:
        # Called for every optimizer that configure_optimizers returned; return another one to replace it.
        # To swap modules, override alter_model() and undo it by run.at_end().
        if not fuse(optimizer):
            warnings.warn(
                f"{{ cookiecutter.class_name }}: {type(optimizer).__name__} has no fused kernel, so it steps as before.",
                NoEffectWarning,
                stacklevel=2,
            )
        return optimizer
