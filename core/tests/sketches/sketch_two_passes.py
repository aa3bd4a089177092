"""A two-pass step: sharpness-aware minimization, https://arxiv.org/abs/2010.01412, equations 2 and 3."""

import torch
from eke import Technique, TechniqueCallback


class SAM(TechniqueCallback):
    technique = Technique(
        name="sam",
        kind="callback",
        effects=("replaces gradients",),
        needs=("automatic optimization",),
        exactness="model-changing",
    )
    passes = 2

    def __init__(self, radius: float = 0.05) -> None:
        self.radius = radius

    @torch.no_grad()
    def before_optimizer_step(self, run, optimizer):
        weights = [one for group in optimizer.param_groups for one in group["params"] if one.grad is not None]
        length = torch.stack([one.grad.norm() for one in weights]).norm() + 1e-12
        before = [one.clone() for one in weights]
        for one in weights:
            one.add_(one.grad, alpha=float(self.radius / length))
        with torch.enable_grad():
            run.second_pass()
        for one, old in zip(weights, before, strict=True):
            one.copy_(old)
