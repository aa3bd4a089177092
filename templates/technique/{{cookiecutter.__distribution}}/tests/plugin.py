import eke
import pytest
import torch
from eke.testing import TechniqueContract, TinyBlocks, fit
from {{ cookiecutter.__module }} import {{ cookiecutter.class_name }}, fuse
from torch import nn


class TestContract(TechniqueContract):
    def build(self):
        return {{ cookiecutter.class_name }}()


def test_a_fused_optimizer_takes_the_step_of_a_loop():
    weights = [nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2)]
    loop, fused = (torch.optim.AdamW([weight], lr=0.1, foreach=False, fused=False) for weight in weights)
    assert fuse(fused)
    for optimizer, weight in zip((loop, fused), weights, strict=True):
        weight.grad = torch.arange(7.0)
        optimizer.step()
    torch.testing.assert_close(weights[0], weights[1])


def test_every_group_of_the_run_is_fused():
    done = fit(TinyBlocks(), {{ cookiecutter.class_name }}(), epochs=1)
    groups = done.trainer.optimizers[0].param_groups
    assert [(group["fused"], group["foreach"]) for group in groups] == [(True, False)] * 2


def test_an_optimizer_without_a_fused_kernel_is_named_and_left_alone():
    optimizer = torch.optim.RMSprop([nn.Parameter(torch.ones(2))])
    technique = {{ cookiecutter.class_name }}()
    run = eke.Run(technique, None, TinyBlocks())
    with pytest.warns(eke.NoEffectWarning, match="RMSprop has no fused kernel"):
        assert technique.alter_optimizer(run, optimizer) is optimizer
    assert "fused" not in optimizer.param_groups[0]


def test_the_registry_builds_it():
    assert isinstance(eke.create("{{ cookiecutter.__entry }}"), {{ cookiecutter.class_name }})
