"""Lion as a technique, in the twenty lines that it takes: an optimizer that goes by the sign of its momentum.

Source: Chen and others, "Symbolic Discovery of Optimization Algorithms", 2023, https://arxiv.org/abs/2302.06675,
program 1.
"""

import torch
from eke import Technique
from eke.technique import TechniqueCallback

ALONE = "AdamW does not know Lion's states: a Trainer without it stops with a KeyError at the first step."
RECORD = Technique(name="lion", kind="callback", factory="lion:Lion",
                   effects=("replaces optimizer", "changes learning rate"),
                   paper="https://arxiv.org/abs/2302.06675", exactness="model-changing",
                   exceptions={"test_its_checkpoint_loads_without_it_or_says_why_not": ALONE})  # fmt: skip


class LionOptimizer(torch.optim.Optimizer):
    """Steps of equal size in every weight: the sign of an average of gradients."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            short, long = group["betas"]
            for weight in (weight for weight in group["params"] if weight.grad is not None):
                average = self.state[weight].setdefault("average", torch.zeros_like(weight))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(average.lerp(weight.grad, 1 - short).sign(), alpha=-group["lr"])
                average.lerp_(weight.grad, 1 - long)
        return loss


class Lion(TechniqueCallback):
    """Lion in place of the model's own optimizer, with its groups and their learning rates."""

    technique = RECORD

    def __init__(self, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        self.betas = betas

    def alter_optimizer(self, run, optimizer):
        kept = ("params", "lr", "weight_decay")
        groups = [{key: group[key] for key in kept} for group in optimizer.param_groups]
        return LionOptimizer(groups, {"betas": self.betas})
