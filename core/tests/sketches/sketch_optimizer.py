"""An optimizer by roles: Lion, https://arxiv.org/abs/2302.06675, algorithm 2; weight decay on hidden matrices alone."""

import torch
from eke import Technique, TechniqueCallback
from eke.seams.roles import decay_groups
from torch.optim import Optimizer


class Lion(Optimizer):
    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for weight in (one for one in group["params"] if one.grad is not None):
                fast, slow = group["betas"]
                mean = self.state[weight].setdefault("mean", torch.zeros_like(weight))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(mean.lerp(weight.grad, 1 - fast).sign_(), alpha=-group["lr"])
                mean.lerp_(weight.grad, 1 - slow)
        return loss


class UseLion(TechniqueCallback):
    technique = Technique(
        name="lion",
        kind="callback",
        effects=("replaces optimizer", "changes learning rate"),
        exactness="model-changing",
    )

    def __init__(self, lr: float = 1e-3, weight_decay: float = 0.1):
        self.lr, self.weight_decay = lr, weight_decay

    def alter_optimizer(self, run, optimizer):
        return Lion(decay_groups(run.module, {"hidden": self.weight_decay}), lr=self.lr)
