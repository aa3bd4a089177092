"""A mask on weights: gradual magnitude pruning, https://arxiv.org/abs/1710.01878, equation 1."""

import torch
from eke import Technique, TechniqueCallback


class Prune(TechniqueCallback):
    """Every ``every`` steps, keep the largest weights of each MLP, fewer each time, until ``density`` are left."""

    technique = Technique(
        name="prune",
        kind="callback",
        effects=("changes weights", "changes gradients", "changes optimizer state"),
        needs=("automatic optimization",),
        exactness="model-changing",
    )

    def __init__(self, density: float = 0.5, until: float = 0.75, every: int = 2):
        self.density, self.last, self.every = density, until, every

    def alter_model(self, run):
        self.until = run.until(self.last, "until")

    def on_train_start(self, trainer, pl_module):
        if not self.run.masks.names:
            weights = {name: one for name, one in pl_module.named_parameters() if "mlp" in name and one.ndim == 2}
            masks = {name: torch.ones_like(one, dtype=torch.bool) for name, one in weights.items()}
            self.run.masks.claim(self.run.name, masks)

    def after_optimizer_step(self, run, optimizer):
        if run.progress.steps % self.every == 0:
            density = self.density + (1 - self.density) * (1 - self.until.done) ** 3
            masks = {name: self.choose(run.module.get_parameter(name), density) for name in run.masks.names}
            run.masks.update(run.name, masks, optimizers=run.trainer.optimizers)

    def choose(self, weight, density):
        kept = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
        kept[weight.detach().abs().flatten().topk(round(density * weight.numel())).indices] = True
        return kept.reshape(weight.shape)
