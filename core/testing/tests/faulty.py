"""A sound technique, and techniques each with one fault that real ones have had. The kit has to find every fault.

The sound one adds noise to the gradient that dies out with the steps (after Neelakantan and others, "Adding Gradient
Noise Improves Learning for Very Deep Networks", 2015, https://arxiv.org/abs/1511.06807, equation 1 with their decay).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from eke import Run, Technique
from eke.technique import TechniqueCallback
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

RECORD = Technique(
    name="gradient_noise",
    kind="callback",
    factory="faulty:GradientNoise",
    paper="https://arxiv.org/abs/1511.06807",
    effects=("changes gradients",),
    exactness="model-changing",
    exceptions={"test_it_has_a_record": "It belongs to the kit and is not installed as a technique."},
)


class GradientNoise(TechniqueCallback):
    """Adds normal noise of standard deviation ``scale / (1 + t) ** 0.55`` to every gradient, t steps from its start.

    Args:
        scale: Standard deviation at the first step. 0 adds nothing.
    """

    technique: ClassVar[Technique] = RECORD

    def __init__(self, scale: float = 1e-3) -> None:
        self.scale = scale
        self.rounds = 0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.scale == 0:
            return
        spread = self.scale / (1 + self.rounds) ** 0.55
        for weight in pl_module.parameters():
            if weight.grad is not None:
                noise = torch.randn(weight.shape, generator=self.generator)
                weight.grad.add_(noise.to(weight.grad), alpha=spread)
        self.rounds += 1

    def state_dict(self) -> dict[str, Any]:
        return {"rounds": self.rounds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rounds = state["rounds"]


# Resuming


class Forgets(GradientNoise):
    """Saves no state: after a resume the noise is as strong as at the start."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class FreezesAgain(GradientNoise):
    """Freezes the embedding for the first epoch; resumed later, it freezes it and nothing thaws it."""

    technique = Technique(
        name="freezes_again",
        kind="callback",
        effects=("changes requires_grad", "changes gradients"),
        exactness="model-changing",
    )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.embed.requires_grad_(self.scale == 0)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            pl_module.embed.requires_grad_(True)

    def end_run(self, run: Run) -> None:
        pl_module = run.module
        pl_module.embed.requires_grad_(True)


class HalvesTheRate(GradientNoise):
    """Halves the learning rate when a run goes on."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > 0:
            for config in trainer.lr_scheduler_configs:
                config.scheduler.base_lrs = [rate / 2 for rate in config.scheduler.base_lrs]


class NeedsItself(GradientNoise):
    """Adds a buffer to the model and gives no manifest: without it the checkpoint's keys do not fit."""

    technique = Technique(
        name="needs_itself",
        kind="callback",
        effects=("changes module tree", "changes gradients"),
        exactness="model-changing",
    )

    def alter_model(self, run: Run) -> None:
        pl_module = run.module
        if self.scale:
            pl_module.register_buffer("noise_level", torch.zeros(1))


# Leaving things alone


class DrawsGlobally(GradientNoise):
    """Draws its noise from the global random state."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.scale:
            for weight in pl_module.parameters():
                weight.grad.add_(torch.randn_like(weight), alpha=self.scale)


class ActsWhenOff(GradientNoise):
    """With ``scale=0`` it still rounds the gradient."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        for weight in pl_module.parameters() if self.scale == 0 else ():
            weight.grad.copy_(weight.grad.bfloat16())


class PatchesAClass(GradientNoise):
    """Patches ``nn.GELU`` for everybody, for good."""

    def alter_model(self, run: Run) -> None:
        nn.GELU.forward = _patched


class LeaksAWrapper(GradientNoise):
    """Wraps a block's forward, and unwraps it only where training ends well."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        block = pl_module.blocks[0]
        block.forward = partial(_through, block)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        del pl_module.blocks[0].forward


class LeavesAHook(GradientNoise):
    """Leaves its forward hook on the model after training."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.blocks[0].register_forward_hook(_same)


class KeepsOtherWeights(GradientNoise):
    """Validates with rounded weights, and puts the true ones back only where validation ends well."""

    technique = Technique(
        name="keeps_other_weights",
        kind="callback",
        effects=("changes gradients", "replaces weights-at-eval"),
        exactness="model-changing",
    )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.kept = [weight.detach().clone() for weight in pl_module.parameters()]
        _write(pl_module, [weight.bfloat16() for weight in self.kept])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _write(pl_module, self.kept)


class LeavesAPerturbation(GradientNoise):
    """Moves the weights for the time of a step, and back only where the step goes well."""

    def around_step(self, run: Run, call_next: Callable[..., Any], batch: Any, *args: Any) -> Any:
        weight = next(self.module.parameters())
        with torch.no_grad():
            weight.mul_(2)
        loss = call_next(batch, *args)
        with torch.no_grad():
            weight.div_(2)
        return loss * 1

    def alter_model(self, run: Run) -> None:
        pl_module = run.module
        self.module = pl_module

    def end_run(self, run: Run) -> None:
        self.module = None


class LeavesHalfAFile(GradientNoise):
    """Writes a file while it trains, and gives it its name at the end."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.path = Path(trainer.default_root_dir, f"noise-{trainer.global_rank}.part")
        self.path.write_text("begun")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.path.unlink()


class WorksOnce(GradientNoise):
    """Keeps what the first run left, and stumbles over it in the second."""

    used = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.used:
            raise RuntimeError("already used")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.used = True


class HoldsALambda(GradientNoise):
    """Cannot be pickled."""

    def __init__(self, scale: float = 1e-3) -> None:
        super().__init__(scale)
        self.decay = lambda rounds: (1 + rounds) ** 0.55


class CopiesComputeWithTheOriginal(GradientNoise):
    """Wraps a forward in a closure, so that a deep copy of the model runs the original's block."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for module in pl_module.modules() if self.scale else ():
            if isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm):
                original = module.forward
                module.forward = lambda x, original=original: original(x)

    def end_run(self, run: Run) -> None:
        pl_module = run.module
        for module in pl_module.modules():
            vars(module).pop("forward", None)


# Numbers


class GoesUphill(GradientNoise):
    """Turns the gradient round."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        for weight in pl_module.parameters() if self.scale else ():
            weight.grad.neg_()


class ClaimsToBeExact(GradientNoise):
    """Is not as exact as its record says."""

    technique = Technique(name="claims_to_be_exact", kind="callback", effects=("changes gradients",), exactness="exact")


class StopsTheVectors(GradientNoise):
    """Clears the gradient of everything that is not a matrix."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        for weight in pl_module.parameters() if self.scale else ():
            if weight.ndim < 2:
                weight.grad.zero_()


class ScalesEachBatch(GradientNoise):
    """Scales the gradient after each backward, so that accumulated parts are scaled again and again."""

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for weight in pl_module.parameters() if self.scale else ():
            weight.grad.mul_(0.9)


class UndoesClipping(GradientNoise):
    """Switches gradient clipping off, because it clips by itself, and then does not."""

    def alter_model(self, run: Run) -> None:
        pl_module = run.module
        pl_module.configure_gradient_clipping = _no_clipping

    def end_run(self, run: Run) -> None:
        pl_module = run.module
        vars(pl_module).pop("configure_gradient_clipping", None)


class DividesByZeroInBf16(GradientNoise):
    """Computes ``1.001 - 1`` in the precision of the run, which in bfloat16 is 0."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.scale == 0:
            return
        dtype = torch.bfloat16 if trainer.precision == "bf16-mixed" else torch.float32
        step = torch.tensor(1.001, dtype=dtype) - 1
        for weight in pl_module.parameters():
            weight.grad.mul_(1e-3 / step.float())


class DiffersBetweenRanks(GradientNoise):
    """Draws other noise on each rank, so that the weights drift apart."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.rounds == 0:
            self.generator.manual_seed(trainer.global_rank)


class HooksInMidRun(GradientNoise):
    """Puts a forward hook on in mid-run, which compiled code never calls."""

    handle: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step >= 4 and self.handle is None and self.scale:
            self.handle = pl_module.blocks[0].mlp.register_forward_hook(_half)

    def end_run(self, run: Run) -> None:
        if self.handle is not None:
            self.handle.remove()
        self.handle = None


class SetsTheRateSecretly(GradientNoise):
    """Changes the learning rate, which its record does not declare."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups if self.scale else ():
            group["lr"] = group["lr"] * 0.5


class TakesItsTime(GradientNoise):
    """Looks at every module in every step, also when it has nothing to do."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.seen = [name for name, _ in pl_module.named_modules()]


class TakesAnything(GradientNoise):
    """Has no arguments that a command line could see."""

    def __init__(self, *scales: float) -> None:
        super().__init__(scales[0])


def _patched(self: nn.GELU, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.gelu(x)


def _through(block: nn.Module, *args: Any) -> torch.Tensor:
    return type(block).forward(block, *args)


def _same(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output


def _half(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output / 2


def _no_clipping(*args: Any, **kwargs: Any) -> None:
    return None


def _write(model: nn.Module, values: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for weight, value in zip(model.parameters(), values, strict=True):
            weight.copy_(value)


class KeepsTheStateOfOneProcess(GradientNoise):
    """Weighs each process's loss by how far that process has counted, and saves the first one's count alone."""

    count = 0.0

    def around_step(self, run: Any, call_next: Any, batch: Any, *args: Any) -> Any:
        if self.scale == 0:
            return call_next(batch, *args)
        if run.first_pass:
            self.count += 0.1 * (1 + run.rank)
        return call_next(batch, *args) / (1 + self.count)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "count": self.count / (1 + self.run.rank)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.count = state["count"]


class CountsPasses(GradientNoise):
    """Weighs a loss by how often it was called, which a second pass over the same batch makes twice as often."""

    calls = 0

    def around_step(self, run: Any, call_next: Any, batch: Any, *args: Any) -> Any:
        if self.scale == 0:
            return call_next(batch, *args)
        self.calls += 1
        return call_next(batch, *args) / self.calls

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.calls = state["calls"]


class SpeaksPython(GradientNoise):
    """Goes on from its state as if it had been written with the same argument."""

    def __init__(self, scale: float = 1e-3) -> None:
        super().__init__(scale)
        self.by_scale = {scale: 0}

    def state_dict(self) -> dict[str, Any]:
        return {"rounds": self.rounds, "scale": self.scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rounds, self.by_scale = state["rounds"], {state["scale"]: 0}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.by_scale[self.scale] += 1


class CallsItsScaleHarmless(GradientNoise):
    """Lets a resumed run have another argument, on which every step depends."""

    may_change = ("scale",)

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__(scale)
