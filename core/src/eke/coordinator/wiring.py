"""The seams of one run: a wrapper around each method of the user's objects at which a technique acts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from eke import compat
from eke.coordinator.opening import ordered, overrides
from eke.seams import schedulers
from eke.seams.data import Position
from eke.seams.masks import Masks
from eke.seams.optimizer import map_optimizers
from eke.seams.standing import Standing
from eke.seams.wrap import Wrapper
from eke.spec import EkeError

if TYPE_CHECKING:
    from eke.run import Run
    from eke.technique import TechniqueCallback


class Wiring:
    """Wraps what the techniques reach into, each technique's methods with its own run.

    Args:
        techniques: In the order of Lightning's hooks. At each seam they have another.
        runs: Of each, by name.
        trainer: Of the run.
        position: Makes train loaders resumable.
    """

    def __init__(
        self, techniques: list[TechniqueCallback], runs: dict[str, Run], trainer: Trainer, position: Position
    ) -> None:
        self.techniques, self.runs, self.trainer, self.position = techniques, runs, trainer, position
        self.wrappers: list[Wrapper] = []

    def at(self, method: str) -> list[Callable[..., Any]]:
        """A seam's guests, in its order: each technique's ``method`` with its run, of those that have one."""
        return [
            _with_run(getattr(one, method), _PAUSED.get(method, _nothing), self.runs[type(one).technique.name])
            for one in ordered(self.techniques, self.trainer, method)
            if overrides(one, method)
        ]

    def wrap(self, owner: object, method: str, *layers: Callable[..., Any], **options: Any) -> None:
        if layers:
            self.wrappers.append(Wrapper(owner, method, list(layers), **options))

    def remove(self) -> None:
        """Give all objects their own methods back."""
        for wrapper in reversed(self.wrappers):
            wrapper.remove()
        self.wrappers = []

    # ------------------------------------------------------------------ the seams

    def model(self, module: LightningModule) -> None:
        """After ``configure_model``, wherever the user builds."""
        if altering := self.at("alter_model"):

            def configure_model(call_next: Callable[..., Any]) -> None:
                call_next()
                # Lightning calls it where new tensors lie on the GPU, to which a model that exists is not yet moved:
                # what a technique puts beside it, or draws from a generator, is made on the CPU and moves with it.
                with torch.device("cpu"):
                    for act in altering:
                        act()

            self.wrap(module, "configure_model", configure_model, looks_overridden=True)

    def weights(self, trainer: Trainer, module: LightningModule) -> None:
        """Before the strategy takes the model up: the first moment at which Lightning knows whether it resumes. Where a
        strategy restores afterwards, what is set here is overwritten."""
        beginning = self.at("initialize")
        if not beginning:
            return

        def setup(call_next: Callable[..., Any], *args: Any) -> None:
            if any(run.fresh for run in self.runs.values()):
                _refuse_meta(module)
                for act in beginning:
                    act()
            call_next(*args)

        self.wrap(trainer.strategy, "setup", setup)

    def batches(self, trainer: Trainer, module: LightningModule, fitting: bool) -> None:
        """Once a batch is on the device."""
        training, evaluating = self.at("alter_batch") if fitting else [], self.at("alter_eval_batch")
        if not training and not evaluating:
            return

        def alter_batch(call_next: Callable[..., Any], batch: Any, *args: Any) -> Any:
            batch = call_next(batch, *args)
            if trainer.predicting:
                return batch
            for act in training if trainer.training else evaluating:
                batch = act(batch)
            return batch

        self.wrap(compat.batch_hook_owner(trainer, module), "on_after_batch_transfer", alter_batch)

    def optimizers(self, module: LightningModule) -> None:
        """What ``configure_optimizers`` returns."""
        optimizing, scheduling = self.at("alter_optimizer"), self.at("alter_schedulers")
        if not optimizing and not scheduling:
            return

        def configure_optimizers(call_next: Callable[..., Any]) -> Any:
            returned = call_next()
            if optimizing and returned is not None:
                returned = _alter_optimizers(returned, optimizing)
            if scheduling:
                returned = schedulers.map_schedulers(returned, change)
            return returned

        def change(optimizers: list[Optimizer], configs: list[dict[str, Any]]) -> list[Any]:
            for act in scheduling:
                configs = list(act(optimizers, configs))
            return configs

        self.wrap(module, "configure_optimizers", configure_optimizers)

    def step(
        self, module: LightningModule, outermost: list[Callable[..., Any]], innermost: list[Callable[..., Any]]
    ) -> None:
        """Around ``training_step``: what repeats it outermost, what packs its tensors innermost."""
        self.wrap(module, "training_step", *outermost, *self.at("around_step"), *innermost)

    def optimizer_step(self, trainer: Trainer, masks: Masks | None) -> None:
        """After the optimizer's step, under every strategy, by hand or by Lightning."""
        after = self.at("after_optimizer_step")
        if masks is not None:  # before the others, which see the zeros, and after them, who may have moved them
            masking = [lambda optimizer: masks.after_step()]
            after = [*masking, *after, *(masking if after else ())]
        if not after:
            return

        def optimizer_step(call_next: Callable[..., Any], optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            output = call_next(optimizer, *args, **kwargs)
            for act in after:
                act(optimizer)
            return output

        self.wrap(trainer.strategy, "optimizer_step", optimizer_step)

    def loaders(self, trainer: Trainer) -> None:
        """A train loader, with Lightning's distributed sampler in it."""
        loading = self.at("alter_loader")

        def process_dataloader(call_next: Callable[..., Any], loader: Any) -> Any:
            given = loader = call_next(loader)
            if not self.position.loading:
                return loader
            before = _order_of(loader)
            for act in loading:
                loader = act(loader)
            chosen = loader is not given or any(a is not b for a, b in zip(_order_of(loader), before, strict=True))
            self.position.attach([loader] if chosen else [])
            return loader

        self.wrap(trainer.strategy, "process_dataloader", process_dataloader)

    def moments(
        self, standing: Standing, trainer: Trainer, batch_ended: Callable[..., Any], epoch_ended: Callable[..., Any]
    ) -> None:
        """Between two batches, and where a batch, a validation and an epoch end: before the first of the callbacks that
        are told, whichever the user listed first, and may save."""
        for owner, method, layer in standing.layers():
            self.wrap(owner, method, layer)
        first = trainer.callbacks[0]

        def before(act: Callable[..., Any]) -> Callable[..., Any]:
            def layer(call_next: Callable[..., Any], *args: Any) -> Any:
                act(*args)
                return call_next(*args)

            return layer

        def validated(trainer: Trainer, *_: Any) -> None:
            if trainer.state.fn == "fit" and not trainer.sanity_checking:
                standing.evaluated()

        self.wrap(first, "on_train_batch_end", before(batch_ended))
        self.wrap(first, "on_train_epoch_end", before(epoch_ended))
        self.wrap(first, "on_validation_end", before(validated))


def _order_of(loader: Any) -> tuple[Any, ...]:
    """What decides which samples a loader gives."""
    batches = getattr(loader, "batch_sampler", None)
    return batches, getattr(batches, "sampler", None)


def _refuse_meta(module: LightningModule) -> None:
    nowhere = next((name for name, one in module.named_parameters() if one.is_meta), None)
    if nowhere is not None:
        raise EkeError(
            f"{nowhere} of {type(module).__name__} has no values yet (it is on the meta device), so no weights can be "
            "set to begin with. Build the model on a device, or leave the initialization out."
        )


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


# What happens at a seam in place of a technique that is paused.
_PAUSED: dict[str, Callable[..., Any]] = {
    "around_step": lambda call_next, *args, **kwargs: call_next(*args, **kwargs),
    "alter_batch": lambda batch: batch,
    "alter_eval_batch": lambda batch: batch,
}


def _with_run(method: Callable[..., Any], instead: Callable[..., Any], run: Run) -> Callable[..., Any]:
    return lambda *args, **kwargs: instead(*args, **kwargs) if run.paused else method(run, *args, **kwargs)


def _alter_optimizers(returned: Any, optimizing: list[Callable[[Optimizer], Optimizer]]) -> Any:
    _, bound = compat.parse_optimizers(returned)

    def alter(optimizer: Optimizer) -> Optimizer:
        before = schedulers.rates(optimizer)
        altered = optimizer
        for act in optimizing:
            altered = act(altered)
        changed.append((altered, before))
        return altered

    changed: list[tuple[Optimizer, list[float]]] = []
    returned = map_optimizers(returned, alter)
    for optimizer, before in changed:  # once the schedules point at the new optimizers
        schedulers.carry(bound, optimizer, before)
    return returned
