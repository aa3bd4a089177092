"""The check of effects finds who changes what it does not declare, and who declares what it does not change."""

import copy

import pytest
import torch
from eke import Technique, TechniqueCallback
from eke.spec import RESOURCES
from eke.testing.checks import Subject
from eke.testing.effects import EXPLAINED_BY, observe, proves_its_effects
from torch import nn
from torch.nn import functional as F


class Reorders(TechniqueCallback):
    def alter_loader(self, run, loader):
        return torch.utils.data.DataLoader(loader.dataset, batch_size=4, sampler=range(len(loader.dataset) - 1, -1, -1))


class MasksTokens(TechniqueCallback):
    def alter_batch(self, run, batch):
        return torch.zeros_like(batch[0]), batch[1]


class TakesHalf(TechniqueCallback):
    def around_step(self, run, call_next, batch, *args):
        return call_next([part[:2] for part in batch], *args)


class AddsALayer(TechniqueCallback):
    def alter_model(self, run):
        pl_module = run.module
        if not isinstance(pl_module.head, nn.Sequential):
            pl_module.head = nn.Sequential(pl_module.head, nn.Linear(*2 * [pl_module.head.out_features]))


class LetsAllMeet(TechniqueCallback):
    def alter_model(self, run):
        pl_module = run.module
        for block in pl_module.blocks:
            block.attn.causal = False


class Rounds(nn.Linear):
    def forward(self, x):
        return F.linear(x.bfloat16(), self.weight.bfloat16(), self.bias.bfloat16()).float()


class ComputesInBf16(TechniqueCallback):
    def alter_model(self, run):
        pl_module = run.module
        for block in pl_module.blocks:
            block.mlp.fc1.__class__ = Rounds


class Freezes(TechniqueCallback):
    def alter_model(self, run):
        pl_module = run.module
        pl_module.embed.requires_grad_(False)


class Shrinks(TechniqueCallback):
    """Weights, after each step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with torch.no_grad():
            for weight in pl_module.parameters():
                weight.mul_(0.9)


class BeginsAnew(TechniqueCallback):
    """Weights, once, before the first step."""

    def on_fit_start(self, trainer, pl_module):
        nn.init.zeros_(pl_module.head.weight)


class DropsTheLast(TechniqueCallback):
    """Tokens, before the first block."""

    def alter_model(self, run):
        pl_module = run.module
        pl_module.norm.register_forward_hook(lambda module, args, output: F.pad(output, (0, 0, 0, 1)))
        pl_module.blocks[0].register_forward_pre_hook(lambda module, args: (args[0][:, :-1],))


class SkipsABlock(TechniqueCallback):
    def alter_model(self, run):
        pl_module = run.module
        pl_module.blocks[1].forward = lambda x: x


class ScalesActivations(TechniqueCallback):
    """Hidden states, their values alone."""

    def alter_model(self, run):
        pl_module = run.module
        pl_module.blocks[1].register_forward_hook(lambda module, args, output: 2 * output)


class Recomputes(TechniqueCallback):
    def alter_model(self, run):
        pl_module = run.module
        from torch.utils.checkpoint import checkpoint

        for block in pl_module.blocks:
            block.forward = lambda x, block=block: checkpoint(type(block).forward, block, x, use_reentrant=False)


class Momentum(TechniqueCallback):
    def alter_optimizer(self, run, optimizer):
        for group in optimizer.param_groups:
            group["betas"] = (0.5, 0.9)
        return optimizer


class ForgetsTheMoments(TechniqueCallback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for state in trainer.optimizers[0].state.values():
            state["exp_avg"].zero_()


class Doubles(TechniqueCallback):
    """The loss."""

    def around_step(self, run, call_next, batch, *args):
        return 2 * call_next(batch, *args)


class Clips(TechniqueCallback):
    """Gradients."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for weight in pl_module.parameters():
            weight.grad.clamp_(-1e-3, 1e-3)


class HalvesTheRate(TechniqueCallback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] / 2


class AveragesAtEval(TechniqueCallback):
    def on_fit_start(self, trainer, pl_module):
        self.model = pl_module

    def eval_weights(self):
        return {name: weight / 2 for name, weight in self.model.named_parameters()}

    def __getstate__(self):
        return {}


CHANGES = [
    ("samples", Reorders),
    ("batch content", MasksTokens),
    ("batch subset", TakesHalf),
    ("module tree", AddsALayer),
    ("attention", LetsAllMeet),
    ("precision", ComputesInBf16),
    ("requires_grad", Freezes),
    ("weights", Shrinks),
    ("weights", BeginsAnew),
    ("tokens", DropsTheLast),
    ("hidden states", SkipsABlock),
    ("hidden states", ScalesActivations),
    ("saved tensors", Recomputes),
    ("optimizer", Momentum),
    ("optimizer state", ForgetsTheMoments),
    ("loss", Doubles),
    ("gradients", Clips),
    ("learning rate", HalvesTheRate),
    ("weights-at-eval", AveragesAtEval),
]
cases = pytest.mark.parametrize(("resource", "technique"), CHANGES, ids=[f"{r}-{t.__name__}" for r, t in CHANGES])


def subject(technique, *effects):
    record = Technique("subject", "callback", effects=effects, exactness="model-changing")
    return Subject(type(technique.__name__, (technique,), {"technique": record}), epochs=2)


@cases
def test_who_changes_it_and_does_not_declare_it_is_found(resource, technique):
    with pytest.raises(AssertionError, match=rf"(?m)^\s*'{resource}' was changed .*neither 'replaces {resource}' nor"):
        proves_its_effects(subject(technique, f"reads {resource}"))


@cases
def test_who_declares_it_passes_where_nothing_else_is_changed(resource, technique):
    also = {DropsTheLast: ("changes hidden states",)}.get(technique, ())
    proves_its_effects(subject(technique, f"changes {resource}", *also))


@pytest.fixture(scope="module")
def nothing():
    return observe(subject(TechniqueCallback))


@pytest.mark.parametrize("resource", EXPLAINED_BY)
def test_a_technique_that_does_nothing_is_seen_to_change_nothing(nothing, resource):
    assert nothing[resource] == ""


@pytest.mark.parametrize("verb", ["replaces", "changes"])
def test_who_declares_what_it_does_not_change_is_found_and_may_say_why(verb):
    idle = subject(TechniqueCallback, f"{verb} weights", "changes loss")
    with pytest.raises(AssertionError) as caught:
        proves_its_effects(idle)
    words = "is declared, and was not changed in 2 epochs of 4 steps"
    assert [line.strip() for line in str(caught.value).splitlines()][:2] == [f"'weights' {words}", f"'loss' {words}"]
    proves_its_effects(idle, {f"{verb} weights": "Not before the third epoch.", "changes loss": "Nor this."})


def test_an_excuse_for_what_is_seen_or_not_declared_is_refused():
    with pytest.raises(AssertionError, match="unseen excuses 'changes loss', which was seen"):
        proves_its_effects(subject(Doubles, "changes loss"), {"changes loss": "It is not."})
    with pytest.raises(AssertionError, match="unseen names what the record does not declare: changes weights"):
        proves_its_effects(subject(Doubles, "changes loss"), {"changes weights": "It does not."})


def test_all_resources_are_proved_but_those_of_several_processes():
    assert set(RESOURCES) - set(EXPLAINED_BY) == {
        f"{what} sharding" for what in ("batch", "parameter", "layer", "optimizer")
    }


def test_watching_leaves_no_hook_behind():
    before = copy.copy(nn.modules.module._global_forward_hooks)
    observe(subject(Clips, "changes gradients"))
    assert nn.modules.module._global_forward_hooks == before


class ShrinksBehindTheLastStep(TechniqueCallback):
    def after_optimizer_step(self, run, optimizer):
        if run.progress.steps % 4 == 3:  # behind the last of four steps in an epoch; validation follows
            with torch.no_grad():
                for weight in run.module.parameters():
                    weight.mul_(0.99)


def test_weights_that_are_changed_behind_a_step_are_not_other_weights_for_validation():
    proves_its_effects(subject(ShrinksBehindTheLastStep, "changes weights"))
