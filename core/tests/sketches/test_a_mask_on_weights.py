"""A sketch against the core: gradual magnitude pruning, with sparse training to the end of the run.

Source of the schedule: Zhu and Gupta, "To prune, or not to prune", 2017, https://arxiv.org/abs/1710.01878, equation 1.
"""

import eke
import pytest
import torch
from eke.testing import TechniqueContract, TinyBlocks, assert_same, fit
from eke.testing.run import resume


# --- sketch
class Prune(eke.TechniqueCallback):
    """Every ``every`` steps, keep the largest weights of each MLP, fewer each time, until ``density`` are left."""

    technique = eke.Technique(
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

    def before_optimizer_step(self, run, optimizer):
        if run.progress.steps % self.every == 0:
            density = self.density + (1 - self.density) * (1 - self.until.done) ** 3
            masks = {name: self.choose(run.module.get_parameter(name), density) for name in run.masks.names}
            run.masks.update(run.name, masks, optimizers=run.trainer.optimizers)

    def choose(self, weight, density):
        kept = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
        kept[weight.detach().abs().flatten().topk(round(density * weight.numel())).indices] = True
        return kept.reshape(weight.shape)


# --- end of sketch


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(eke, "get", lambda name: Prune.technique)


class TestContract(TechniqueContract):
    exceptions = {
        "test_it_costs_nothing_when_it_has_nothing_to_do": "it puts masks on in every step, two operators each"
    }

    def build(self):
        return Prune()


def test_at_the_end_each_matrix_has_the_density_that_was_asked_for_and_its_zeros_have_no_moments():
    done = fit(TinyBlocks(), Prune(density=0.3, until=0.75, every=1))
    optimizer = done.trainer.optimizers[0]
    for name, weight in done.model.named_parameters():
        zeros = int((weight == 0).sum())
        if "mlp" in name and weight.ndim == 2:
            assert weight.numel() - zeros == round(0.3 * weight.numel())
            assert not optimizer.state[weight]["exp_avg"][weight == 0].any()
        elif weight.ndim == 2:
            assert zeros == 0


def test_a_resumed_run_has_the_masks_of_the_unbroken_one():
    unbroken, resumed = resume(lambda seed: TinyBlocks(seed=seed), Prune, after_steps=6)
    masks = [state["saved"]["eke"]["masks"] for state in (unbroken, resumed)]
    assert_same(*masks, "masks in the checkpoint of the unbroken run, then of the resumed one")
    assert len(masks[0]["prune"]["masks"]) == 8
