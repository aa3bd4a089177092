"""The base class of techniques that reach into a run, and the one coordinator that runs them.

Lightning calls every hook of every callback in every step, about 108 Python calls for a callback that does nothing. So
all techniques of a Trainer are taken off its callback list and one coordinator stands in their place: it calls, in
the order that the records imply, only those that have something to do, and holds one wrapper per seam.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer

from eke import compat, compose
from eke.seams import state as checkpoints
from eke.seams.clock import Clock
from eke.seams.data import Position
from eke.seams.optimizer import map_optimizers
from eke.seams.swap import Swap
from eke.seams.wrap import Wrapper
from eke.spec import ConflictError, Technique


class TechniqueCallback(Callback):
    """A callback that may reach into a run at Eke's seams. Override what is needed; leave the rest.

    Ordinary callback hooks (``on_train_batch_start`` and so on) may be overridden too. ``setup`` and ``teardown``
    are the core's. The methods below are called in the order that the records of all techniques imply, whatever
    order the user listed them in.

    Class attributes:
        technique: The record.
        counts: ``"samples"`` and ``"tokens"``, if the technique reads them from the clock: counting costs.
        version: Of what ``state_dict`` returns. A later version has to read earlier ones.
    """

    technique: ClassVar[Technique]
    counts: ClassVar[tuple[str, ...]] = ()
    version: ClassVar[int] = 1

    _coordinator: Coordinator | None = None
    _generator: torch.Generator | None = None

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse, in words and before anything is touched, a Trainer that cannot work with the technique."""

    def alter_model(self, pl_module: LightningModule) -> None:
        """Change the model once its module tree is built; before weights load, the strategy wraps it or
        optimizers exist. Runs for ``fit``, ``validate``, ``test`` and ``predict``, each time: be idempotent."""

    def restore_model(self, pl_module: LightningModule) -> None:
        """Undo what should not outlive the run: gates and wrappers. Called at the end and after an exception."""

    def alter_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Replace or wrap one optimizer that ``configure_optimizers`` built. Schedulers follow by themselves."""
        return optimizer

    def alter_loader(self, loader: Any) -> Any:
        """Change a train loader, after Lightning has put its distributed sampler in."""
        return loader

    def alter_batch(self, batch: Any) -> Any:
        """Change a training batch, once it is on the device."""
        return batch

    def alter_eval_batch(self, batch: Any) -> Any:
        """Change a batch of validation or testing, once it is on the device."""
        return batch

    def begin_samples(self, trainer: Trainer) -> None:
        """For techniques that change how many batches an epoch has: called when training starts, after all of
        ``on_train_start``, so that what goes by the length of the run goes by its full length, resumed or not."""

    def around_step(self, call_next: Callable[..., Any], batch: Any, *args: Any) -> Any:
        """Act around ``training_step``; its value is the loss, or what the user returns."""
        return call_next(batch, *args)

    def eval_weights(self) -> Mapping[str, torch.Tensor] | None:
        """Weights that validation and saved models should have in place of the training weights."""
        return None

    def manifest(self) -> dict[str, Any] | None:
        """What a fresh process has to know to build the same module tree before weights load."""
        return None

    def shape_from(self, manifest: dict[str, Any], pl_module: LightningModule) -> None:
        """Build the module tree that :meth:`manifest` described."""

    def alter_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Change what is about to be saved, such as leave out weights that did not train."""

    def complete_checkpoint(self, checkpoint: dict[str, Any], pl_module: LightningModule) -> None:
        """Put back what :meth:`alter_checkpoint` left out, after :meth:`shape_from` and before weights load."""

    def step_kind(self) -> str:
        """What the cost of the coming step depends on, such as ``"4 of 8 blocks"``: benchmarks charge steps by kind."""
        return ""

    def on_this_machine(self) -> str:
        """What the technique would take here, and why, for ``eke check``: ``"by torchao (the first that ...)"``.

        Raises:
            EkeError: it cannot run here.
        """
        return ""

    @property
    def clock(self) -> Clock:
        """Steps, batches, samples and tokens done so far."""
        return self._coordinator.clock if self._coordinator is not None else Clock()

    @property
    def generator(self) -> torch.Generator:
        """Random numbers of this technique's own, on the CPU: the same on all processes, saved and resumed."""
        if self._generator is None:
            self._generator = torch.Generator().manual_seed(zlib.crc32(self.technique.name.encode()))
        return self._generator

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Only the first technique of the list gets here: the coordinator takes the others off it.
        coordinator = Coordinator.of(trainer)
        if not coordinator.opening:
            coordinator.setup(trainer, pl_module, stage)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_coordinator"}


class TechniqueStrategy:
    """Inherit it before one of Lightning's strategies: a run then keeps its data order, its random state and the
    gradients of a window that is cut in two across a resume, with or without a callback of Eke.

    Example::

        class Sharded(TechniqueStrategy, ModelParallelStrategy):
            technique = RECORD

    Class attributes:
        technique: The record.
        shards_in_setup: It shards the model itself, after techniques have changed it and not in ``configure_model``.
        shards_optimizer: A process's optimizer holds a part of the states, so that a model cannot grow in mid-run.
    """

    technique: ClassVar[Technique]
    shards_in_setup: ClassVar[bool] = False
    shards_optimizer: ClassVar[bool] = False

    def connect(self, model: LightningModule) -> None:
        super().connect(model)
        Coordinator.of(model.trainer)  # the first moment that belongs to the run, and before any callback is set up


def techniques(trainer: Trainer) -> list[TechniqueCallback]:
    """The Eke techniques of a Trainer, in the order in which they act."""
    if not any(isinstance(one, (TechniqueCallback, Coordinator)) for one in trainer.callbacks):
        return []  # and no coordinator: a run that has begun without one would call one that was never set up
    return list(Coordinator.of(trainer).techniques)


class Coordinator(Callback):
    """Stands in the Trainer's callback list for all techniques."""

    def __init__(self) -> None:
        self.techniques: list[TechniqueCallback] = []
        self.clock = Clock()
        self.position = Position()
        self.opening = False
        self._open = False
        self._wrappers: list[Wrapper] = []
        self._guests: dict[str, list[Callable[..., Any]]] = {}
        self._swap: Swap | None = None
        self._gradients: dict[str, torch.Tensor] = {}  # of a window that a checkpoint cut in two

    @classmethod
    def of(cls, trainer: Trainer) -> Coordinator:
        """The Trainer's coordinator, which takes all techniques off the callback list."""
        found = next((one for one in trainer.callbacks if isinstance(one, cls)), None)
        listed = [one for one in trainer.callbacks if isinstance(one, TechniqueCallback)]
        if found is None:
            found = cls()
            place = trainer.callbacks.index(listed[0]) if listed else 0
            trainer.callbacks = [*trainer.callbacks[:place], found, *trainer.callbacks[place:]]
        if listed:
            # A new list: Lightning may be walking along the old one.
            trainer.callbacks = [one for one in trainer.callbacks if not isinstance(one, TechniqueCallback)]
            found.techniques.extend(listed)
        return found

    # ------------------------------------------------------------------ opening and closing

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        Coordinator.of(trainer)  # takes up techniques that were listed since the last run
        self.opening = True
        try:
            self.close(pl_module)
            self._order(trainer)
            self._check(trainer, pl_module, stage)
            self._seed(trainer)
            self._wrap(trainer, pl_module, stage)
        finally:
            self.opening = False

    def _order(self, trainer: Trainer) -> None:
        by_name = {type(one).technique.name: one for one in self.techniques}
        others = [
            record
            for part in (trainer.strategy, trainer.precision_plugin)
            if (record := getattr(type(part), "technique", None)) is not None
        ]
        ordered = compose.order([*(type(one).technique for one in self.techniques), *others])
        self.techniques = [by_name[record.name] for record in ordered if record.name in by_name]

    def _check(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            for technique in self.techniques:
                for need in type(technique).technique.needs:
                    _NEEDS[need](technique, trainer, pl_module)
        altering = self._overriding("alter_model")
        user_shards = isinstance(trainer.strategy, ModelParallelStrategy) and is_overridden(
            "configure_model", pl_module
        )
        if altering and user_shards and not getattr(trainer.strategy, "shards_in_setup", False):
            raise MisconfigurationException(
                f"{type(altering[0]).__name__} changes the model after configure_model, where "
                f"{type(pl_module).__name__} has sharded it already. Use a strategy that shards by itself, or leave "
                "the technique out."
            )
        for technique in self.techniques:
            technique.check(trainer, pl_module)

    def _seed(self, trainer: Trainer) -> None:
        seed = int(trainer.strategy.broadcast(torch.initial_seed()))  # read, not drawn: the user's stream stays
        for technique in self.techniques:
            technique._coordinator = self
            if technique._generator is None:
                own = zlib.crc32(type(technique).technique.name.encode())
                technique._generator = torch.Generator().manual_seed((seed ^ own) % 2**63)

    def _wrap(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._open = True
        self.position = Position()
        self.clock.connect(trainer if stage == "fit" else None, frozenset(w for t in self.techniques for w in t.counts))
        self._guests = {
            hook: [getattr(one, hook) for one in self.techniques if _overrides(one, hook)] for hook in _HOOKS
        }

        def wrap(owner: object, method: str, layer: Callable[..., Any], **options: Any) -> None:
            self._wrappers.append(Wrapper(owner, method, [layer], **options))

        if altering := self._overriding("alter_model"):

            def configure_model(call_next: Callable[..., Any]) -> None:
                call_next()
                # Lightning calls it where new tensors lie on the GPU, to which a model that exists is not yet moved:
                # what a technique puts beside it, or draws from a generator, is made on the CPU and moves with it.
                with torch.device("cpu"):
                    for technique in altering:
                        technique.alter_model(pl_module)

            wrap(pl_module, "configure_model", configure_model, looks_overridden=True)

        wrap(pl_module, "on_save_checkpoint", self._save)
        wrap(pl_module, "on_load_checkpoint", self._load)
        batching, evaluating = self._overriding("alter_batch"), self._overriding("alter_eval_batch")
        if (batching and stage == "fit") or evaluating:

            def alter_batch(call_next: Callable[..., Any], batch: Any, *args: Any) -> Any:
                batch = call_next(batch, *args)
                if trainer.training:
                    for technique in batching:
                        batch = technique.alter_batch(batch)
                elif not trainer.predicting:
                    for technique in evaluating:
                        batch = technique.alter_eval_batch(batch)
                return batch

            wrap(compat.batch_hook_owner(trainer, pl_module), "on_after_batch_transfer", alter_batch)
        if stage != "fit":
            return
        if optimizing := self._overriding("alter_optimizer"):

            def alter_optimizer(optimizer: Optimizer) -> Optimizer:
                for technique in optimizing:
                    optimizer = technique.alter_optimizer(optimizer)
                return optimizer

            wrap(pl_module, "configure_optimizers", lambda call_next: map_optimizers(call_next(), alter_optimizer))
        if stepping := self._overriding("around_step"):
            self._wrappers.append(Wrapper(pl_module, "training_step", [one.around_step for one in stepping]))

        loading = self._overriding("alter_loader")

        def process_dataloader(call_next: Callable[..., Any], loader: Any) -> Any:
            loader = call_next(loader)
            if trainer.training:
                for technique in loading:
                    loader = technique.alter_loader(loader)
                self.position.attach(loader)
            return loader

        wrap(trainer.strategy, "process_dataloader", process_dataloader)

    def _overriding(self, method: str) -> list[TechniqueCallback]:
        return [one for one in self.techniques if _overrides(one, method)]

    def close(self, pl_module: LightningModule) -> None:
        """Take every wrapper off and let each technique undo what should not outlive the run."""
        if not self._open:
            return
        self._open = False
        self._leave_eval_weights()
        try:
            for technique in reversed(self.techniques):
                technique.restore_model(pl_module)
        finally:
            for wrapper in reversed(self._wrappers):
                wrapper.remove()
            self._wrappers = []
            self.position.detach()
            self.clock.connect(None)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.close(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        try:
            for guest in self._guests.get("on_exception", ()):
                guest(trainer, pl_module, exception)
        finally:
            self.close(pl_module)  # Lightning calls no teardown when a run fails

    # ------------------------------------------------------------------ checkpoints

    def _save(self, call_next: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
        self._write(checkpoint)
        call_next(checkpoint)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for guest in self._guests.get("on_save_checkpoint", ()):
            guest(trainer, pl_module, checkpoint)
        # After the run the wrapper is gone, and only this hook is left. Not called for weights-only files.
        self._write(checkpoint, trainer)

    def _write(self, checkpoint: dict[str, Any], trainer: Trainer | None = None) -> None:
        if checkpoints.KEY in checkpoint:
            return
        trainer = trainer or self.clock.trainer
        entries = {}
        for technique in self.techniques:
            name = type(technique).technique.name
            entry = {
                "version": technique.version,
                "manifest": technique.manifest(),
                "state": technique.state_dict(),
                "generator": technique.generator.get_state(),
            }
            checkpoints.check_plain(entry, f"state of {name}")
            entries[name] = entry
        own: dict[str, Any] = {"version": checkpoints.VERSION, "clock": self.clock.state_dict(), "techniques": entries}
        if trainer is not None and "optimizer_states" in checkpoint:
            here = {**self.position.state_dict(trainer), "gradients": checkpoints.held_gradients(trainer)}
            own["ranks"] = checkpoints.gather(trainer, here)
        checkpoint[checkpoints.KEY] = own
        self._save_eval_weights(checkpoint)
        for technique in self._overriding("alter_checkpoint"):
            technique.alter_checkpoint(checkpoint)

    def _load(self, call_next: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
        own = checkpoint.get(checkpoints.KEY)
        if own is not None:
            trainer = self.clock.trainer
            fitting = trainer is not None
            self._refuse_missing(own["techniques"], fitting)
            for technique in self.techniques:
                manifest = own["techniques"].get(type(technique).technique.name, {}).get("manifest")
                if manifest is not None:
                    self._refuse_late_shape(technique, trainer)
                    technique.shape_from(manifest, self._module(call_next))
            for technique in self._overriding("complete_checkpoint"):
                technique.complete_checkpoint(checkpoint, self._module(call_next))
            if fitting and (training := own.get("training_weights")):
                checkpoint["state_dict"].update(training)
            if "callbacks" not in checkpoint:  # a weights-only file: the callback hook below will not be called
                self._restore(own)
        call_next(checkpoint)

    @staticmethod
    def _module(call_next: Callable[..., Any]) -> LightningModule:
        return call_next.func.__self__.owner

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        own = checkpoint.get(checkpoints.KEY)
        if own is not None:
            self._restore(own)
            if trainer.state.fn == "fit" and "ranks" in own:
                self._restore_rank(trainer, own["ranks"])
        for guest in self._guests.get("on_load_checkpoint", ()):
            guest(trainer, pl_module, checkpoint)

    def _restore(self, own: dict[str, Any]) -> None:
        self.clock.load_state_dict(own["clock"])
        for technique in self.techniques:
            entry = own["techniques"].get(type(technique).technique.name)
            if entry is None:
                continue
            if entry["version"] > technique.version:
                raise ConflictError(
                    f"the checkpoint holds {type(technique).technique.name!r} state of version {entry['version']}, and "
                    f"the installed one reads up to {technique.version}. Update its distribution."
                )
            technique.generator.set_state(entry["generator"])
            technique.load_state_dict(entry["state"])

    def _restore_rank(self, trainer: Trainer, ranks: list[dict[str, Any]]) -> None:
        if len(ranks) != trainer.world_size:
            rank_zero_info(
                f"Eke: the checkpoint was written by {len(ranks)} processes and this run has {trainer.world_size}: "
                "training goes on at the saved step, with the data order and random numbers of a new epoch."
            )
            return
        self.position.load_state_dict(ranks[trainer.global_rank])
        self._gradients = ranks[trainer.global_rank]["gradients"]

    def _refuse_missing(self, saved: Mapping[str, Any], fitting: bool) -> None:
        here = {type(one).technique.name for one in self.techniques}
        missing = [name for name, entry in saved.items() if name not in here and (fitting or entry["manifest"])]
        if missing:
            raise ConflictError(
                f"the checkpoint was written with {', '.join(map(repr, missing))}, which this Trainer does not have. "
                "Add it to callbacks=, or the run would not go on as it was."
            )

    @staticmethod
    def _refuse_late_shape(technique: TechniqueCallback, trainer: Trainer | None) -> None:
        if trainer is not None and trainer.strategy.restore_checkpoint_after_setup:
            raise MisconfigurationException(
                f"{type(technique).__name__} has to change the model's shape before weights load, and "
                f"{type(trainer.strategy).__name__} loads them after sharding it. Resume on one device or with "
                "strategy='ddp'."
            )

    # ------------------------------------------------------------------ weights for evaluation

    def _eval_weights(self) -> Mapping[str, torch.Tensor] | None:
        for technique in self.techniques:
            if (weights := technique.eval_weights()) is not None:
                return weights  # only one technique may replace the weights-at-eval
        return None

    def _enter_eval_weights(self, pl_module: LightningModule) -> None:
        weights = self._eval_weights()
        if weights is not None:
            self._swap = Swap(pl_module)
            self._swap.enter(weights)

    def _leave_eval_weights(self) -> None:
        if self._swap is not None:
            self._swap.leave()
            self._swap = None

    def _save_eval_weights(self, checkpoint: dict[str, Any]) -> None:
        weights = self._eval_weights()
        if weights is None:
            return
        kept = self._swap.kept if self._swap is not None else {}
        saved = checkpoint["state_dict"]
        if "optimizer_states" in checkpoint:
            checkpoint[checkpoints.KEY]["training_weights"] = {name: kept.get(name, saved[name]) for name in weights}
        checkpoint["state_dict"] = {**saved, **weights}

    # ------------------------------------------------------------------ hooks of a run

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        compat.leave_finished_epoch(trainer)
        self.position.start(trainer)
        if self._gradients:
            checkpoints.set_gradients(pl_module, self._gradients)
            self._gradients = {}
        for guest in self._guests["on_train_start"]:
            guest(trainer, pl_module)
        for technique in self._overriding("begin_samples"):
            technique.begin_samples(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.clock.before_batch(trainer, batch_idx)
        for guest in self._guests["on_train_batch_start"]:
            guest(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.clock.after_batch(trainer, batch)
        for guest in self._guests["on_train_batch_end"]:
            guest(trainer, pl_module, outputs, batch, batch_idx)


def _overrides(technique: TechniqueCallback, method: str) -> bool:
    return getattr(type(technique), method) is not getattr(TechniqueCallback, method)


def _forward(hook: str, before: Callable[[Coordinator, LightningModule], None] | None = None) -> Callable[..., None]:
    """A hook of the coordinator that calls the techniques that have one, after ``before``."""

    def call(self: Coordinator, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        if before is not None:
            before(self, pl_module)
        for guest in self._guests.get(hook, ()):
            guest(trainer, pl_module, *args, **kwargs)

    call.__name__ = hook
    return call


_HOOKS = [name for name in dir(Callback) if name.startswith("on_")]
_BEFORE: dict[str, Callable[[Coordinator, LightningModule], None]] = {
    f"on_{stage}_{moment}": action
    for stage in ("validation", "test", "predict")
    for moment, action in (
        ("start", Coordinator._enter_eval_weights),
        ("end", lambda coordinator, _: coordinator._leave_eval_weights()),
    )
}
for _hook in _HOOKS:
    if _hook not in vars(Coordinator):
        setattr(Coordinator, _hook, _forward(_hook, _BEFORE.get(_hook)))


def _automatic_optimization(technique: TechniqueCallback, trainer: Trainer, pl_module: LightningModule) -> None:
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"{type(technique).__name__} acts between backward and the optimizer's step, which "
            f"{type(pl_module).__name__} does by hand (automatic_optimization=False). Leave the technique out, or "
            "let Lightning optimize."
        )


def _one_optimizer(technique: TechniqueCallback, trainer: Trainer, pl_module: LightningModule) -> None:
    _automatic_optimization(technique, trainer, pl_module)  # Lightning itself allows only one then


def _sized_training_data(technique: TechniqueCallback, trainer: Trainer, pl_module: LightningModule) -> None:
    if trainer.max_steps == -1 and trainer.max_epochs == -1:
        raise MisconfigurationException(
            f"{type(technique).__name__} needs to know how long the run is, and this one has no end. "
            "Give Trainer(max_steps=...) or max_epochs=."
        )


_NEEDS = {
    "automatic optimization": _automatic_optimization,
    "one optimizer": _one_optimizer,
    "sized training data": _sized_training_data,
}


def load_from_checkpoint(
    cls: type[LightningModule],
    path: str,
    callbacks: list[TechniqueCallback] | None = None,
    **kwargs: Any,
) -> LightningModule:
    """``cls.load_from_checkpoint`` for a model that techniques have reshaped.

    Args:
        cls: The user's LightningModule class.
        path: Checkpoint file.
        callbacks: The techniques of the run. Without them, each is built with its default arguments.
        kwargs: For ``cls.load_from_checkpoint``.

    Raises:
        EkeError: a technique that reshaped the model is not installed.
    """
    from eke import registry

    given = {type(one).technique.name: one for one in callbacks or ()}

    class Reshaped(cls):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            written = checkpoint.get(checkpoints.KEY, {}).get("techniques", {})
            for name, technique in given.items():  # a file saved after the run, of weights only, says nothing of them
                shapes = isinstance(technique, TechniqueCallback) and _overrides(technique, "manifest")
                if name not in written and shapes:
                    technique.alter_model(self)
            for name, entry in written.items():
                if entry["manifest"] is not None:
                    technique = given.get(name) or registry.create(name)
                    technique.shape_from(entry["manifest"], self)
                    technique.complete_checkpoint(checkpoint, self)
            super().on_load_checkpoint(checkpoint)

    Reshaped.__name__, Reshaped.__qualname__, Reshaped.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    model = Reshaped.load_from_checkpoint(path, **kwargs)
    model.__class__ = cls
    return model
