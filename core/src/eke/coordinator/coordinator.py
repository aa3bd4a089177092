"""Opens and closes runs, and keeps what outlives a hook."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import DoublePrecision
from torch import Tensor

from eke import strategies
from eke.coordinator import checkpoint as checkpoints
from eke.coordinator import opening
from eke.coordinator.hooks import HOOKS, Hooks
from eke.coordinator.wiring import Wiring
from eke.run import Run, Shared, forget_run
from eke.seams import state
from eke.seams.data import Position
from eke.seams.gradients import GradientCheck
from eke.seams.masks import Masks
from eke.seams.passes import Passes
from eke.seams.progress import Progress
from eke.seams.saved import Saved
from eke.seams.shards import is_sharded
from eke.seams.standing import Standing, refuse_finders
from eke.seams.state import Copies
from eke.seams.step import with_graph
from eke.seams.swap import Swap
from eke.seams.terms import LossTerms

if TYPE_CHECKING:
    from eke.technique import TechniqueCallback


class Coordinator(Hooks):
    """Stands in the Trainer's callback list for all techniques."""

    def __init__(self) -> None:
        super().__init__()
        self.techniques: list[TechniqueCallback] = []
        self.progress = Progress()
        self.position = Position()
        self.standing: Standing | None = None  # of the run in fit, and after it, for a checkpoint that is written then
        self.opening = False
        self.runs: dict[str, Run] = {}
        self._wiring: Wiring | None = None  # while a run is open
        self._passes: Passes | None = None
        self._masks: Masks | None = None  # outlives the run, as the zeros do, for a checkpoint that is written after it
        self._swap: Swap | None = None
        self._stateful: list[TechniqueCallback] = []  # those that keep a state of their own
        self._before_step: list[Callable[..., Any]] = []
        self._gradients: GradientCheck | None = None
        self._states: dict[str, dict[str, Any]] = {}  # of techniques that are paused
        self._resumed: dict[str, Any] = {}  # the checkpoint's, until training starts
        self._begins_with: dict[str, Any] = {}  # what this process had of its own, from a checkpoint

    @classmethod
    def of(cls, trainer: Trainer) -> Coordinator:
        """The Trainer's coordinator, which takes all techniques off the callback list."""
        from eke.technique import TechniqueCallback

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
            self.close()
            self.techniques = opening.ordered(self.techniques, trainer)
            self._open(trainer, pl_module, stage)
        finally:
            self.opening = False

    def _open(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        fitting = stage == "fit"
        counts = frozenset(word for one in self.techniques for word in one.counts)
        self.progress.connect(trainer if fitting else None, counts)
        opening.seed(self.techniques, trainer)
        if self._masks is None or self._masks.module is not module:
            self._masks = Masks(module)
        shared = Shared(self.progress, self._masks, Saved(module), position=Position(trainer))
        if fitting and self._any("loss"):
            shared.terms = LossTerms(module)
        if fitting and any(one.passes > 1 for one in self.techniques):
            shared.passes = Passes(trainer, module, [one.generator for one in self.techniques])
        self._passes = shared.passes
        self.runs = {type(one).technique.name: Run(one, trainer, module, stage, shared) for one in self.techniques}
        for technique in self.techniques:
            technique._coordinator, technique._run = self, self.runs[type(technique).technique.name]
        self._wiring = Wiring(self.techniques, self.runs, trainer, shared.position)
        if fitting:
            self.position = self._wiring.position
            self._stateful = [one for one in self.techniques if opening.overrides(one, "state_dict")]
            self.standing = Standing(trainer, module, self.position, shared.passes, self._others)
        try:
            opening.check(self.techniques, self.runs, trainer, module)
        except BaseException:
            self.close()
            raise
        self._listen()
        self._before_step = self._wiring.at("before_optimizer_step")
        masks = self._masks if self._any("weights") else None
        if masks is not None:  # after all others: they see the gradients of all weights
            self._before_step.append(lambda optimizer: masks.before_step())
        self._wire(trainer, module, fitting)
        if fitting:
            packing = [shared.saved.around] if self._any("saved tensors") else []
            outermost = [one.around for one in (shared.passes, shared.terms) if one is not None]
            if self._any("hidden states") or self._any("module tree"):  # who may skip blocks
                outermost.append(with_graph(module))
            self._wiring.step(module, outermost, packing)
            self._wiring.optimizer_step(trainer, masks)

    def _listen(self) -> None:
        heard = [one for one in self.techniques if not one._run.paused]
        self.listeners = {hook: [getattr(one, hook) for one in heard if opening.overrides(one, hook)] for hook in HOOKS}

    def pause(self, technique: TechniqueCallback) -> None:
        """End a technique's run, and call nothing of it until :meth:`resume`. Between two batches."""
        run = technique._run
        self._states[run.name] = technique.state_dict()
        technique.end_run(run)
        run.close()
        forget_run(technique)
        run.paused = True
        self._listen()

    def resume(self, technique: TechniqueCallback) -> None:
        """Open a paused technique's run again, as a resumed one is opened."""
        run = technique._run
        run.paused = False
        technique.check(run)
        technique.alter_model(run)
        if state := self._states.pop(run.name):
            technique.load_state_dict(state)
        technique.on_train_start(run.trainer, run.module)
        self._listen()

    def _wire(self, trainer: Trainer, module: LightningModule, fitting: bool) -> None:
        wiring = self._wiring
        wiring.model(module)

        def save(call_next: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
            self._write(checkpoint, trainer if fitting else None)
            call_next(checkpoint)

        def load(call_next: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
            self._load(checkpoint, module)
            if fitting and isinstance(trainer.precision_plugin, DoublePrecision):
                trainer.precision_plugin.convert_module(module)  # Lightning does so after weights have loaded, rounded
            call_next(checkpoint)

        wiring.wrap(module, "on_save_checkpoint", save)
        wiring.wrap(module, "on_load_checkpoint", load)
        wiring.batches(trainer, module, fitting)
        if fitting:
            wiring.weights(trainer, module)
            wiring.optimizers(module)
            wiring.loaders(trainer)
            wiring.moments(self.standing, trainer, self._batch_ended, self._epoch_ended)
            places = count()

            def process_dataloader(call_next: Callable[..., Any], loader: Any) -> Any:
                loader = call_next(loader)
                if trainer.training and self._resumed:
                    checkpoints.check_data(self._resumed, loader, next(places))
                return loader

            wiring.wrap(trainer.strategy, "process_dataloader", process_dataloader)

    def _others(self, copies: Copies) -> dict[str, Any]:
        """What a checkpoint holds of techniques, beside what they were built from. It runs for each batch."""
        states, generators = {}, {}
        for one in self._stateful:
            states[type(one).technique.name] = copies.take(one.state_dict(), type(one).technique.name)
        for one in self.techniques:
            generators[type(one).technique.name] = one._generator.get_state()
        return {"states": states, "generators": generators, "progress": self.progress.counted()}

    def _any(self, resource: str) -> bool:
        """Whether a technique of the run writes to a resource."""
        records = (type(one).technique for one in self.techniques)
        return any(resource in record.touches("changes") | record.touches("replaces") for record in records)

    def close(self) -> None:
        """Take every wrapper off and let each technique undo what should not outlive the run."""
        if self._wiring is None:
            return
        wiring, self._wiring = self._wiring, None
        self._leave_eval_weights()
        try:
            for technique in reversed(self.techniques):
                run = self.runs[type(technique).technique.name]
                try:
                    technique.end_run(run)
                finally:
                    run.close()
        finally:
            wiring.remove()
            self.position.detach()
            self.progress.connect(None)
            self.runs, self._passes, self._before_step, self._gradients, self._states = {}, None, [], None, {}
            for technique in self.techniques:
                technique._run = None
                forget_run(technique)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        try:
            if self.standing is not None and self._wiring is not None and trainer.state.fn == "fit":
                self.standing.freeze()
            super().on_exception(trainer, pl_module, exception)
        finally:
            self.close()  # Lightning calls no teardown when a run fails

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        # After the run the wrapper is gone, and only this hook is left. Not called for weights-only files.
        self._write(checkpoint, trainer)

    def _write(self, checkpoint: dict[str, Any], trainer: Trainer | None) -> None:
        if state.KEY in checkpoint:
            return
        past = None if trainer is None or self.standing is None else self.standing.past()
        checkpoints.write(checkpoint, self.techniques, self.progress, self._swap, self._masks)
        if past is not None:
            checkpoints.write_past(checkpoint, past)
        if trainer is not None and self.standing is not None and "optimizer_states" in checkpoint:
            checkpoints.note_data(checkpoint, trainer)
            checkpoints.write_ranks(checkpoint, self.techniques, trainer, self.standing, past)

    def _load(self, checkpoint: dict[str, Any], module: LightningModule) -> None:
        own = checkpoints.read(checkpoint)
        if self.progress.trainer is not None:
            checkpoints.compare(own, self.techniques)
        if own is None:
            return
        checkpoints.take_back(checkpoint)
        checkpoints.shape(checkpoint, self.techniques, module, self.progress.trainer)
        if "callbacks" not in checkpoint:  # a weights-only file: the callback hook below will not be called
            checkpoints.restore(own, self.techniques, self.progress, self._masks)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        own = checkpoint.get(state.KEY)
        if own is not None:
            checkpoints.restore(own, self.techniques, self.progress, self._masks)
            if trainer.state.fn == "fit" and "ranks" in own and self.standing is not None:
                refuse_finders(trainer)
                self._begins_with = checkpoints.rank_of(own, trainer) or {}
                checkpoints.restore_rank(self._begins_with, self.techniques)
                self._resumed = own
                if "stage" in self._begins_with:
                    checkpoints.go_on(checkpoint, self._begins_with, self.standing)
        super().on_load_checkpoint(trainer, pl_module, checkpoint)

    # ------------------------------------------------------------------ weights for evaluation

    def _enter_eval_weights(self, module: LightningModule) -> None:
        weights = checkpoints.eval_weights(self.techniques)
        if weights is not None:
            self._swap = Swap(module)
            self._swap.enter(weights)

    def _leave_eval_weights(self) -> None:
        if self._swap is not None:
            self._swap.leave()
            self._swap = None

    @staticmethod
    def _trains(trainer: Trainer) -> bool:
        return trainer.state.fn == "fit" and not trainer.sanity_checking

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._trains(trainer):
            self.standing.evaluates()
        self._enter_eval_weights(pl_module)
        super().on_validation_start(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave_eval_weights()
        super().on_validation_end(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter_eval_weights(pl_module)
        super().on_test_start(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave_eval_weights()
        super().on_test_end(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter_eval_weights(pl_module)
        super().on_predict_start(trainer, pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave_eval_weights()
        super().on_predict_end(trainer, pl_module)

    # ------------------------------------------------------------------ hooks of a run

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_sharded(pl_module.parameters()):
            self._stateful = []  # a state may have to be gathered: too dear for each batch
        self.standing.start()
        self.progress.begin(trainer)
        resumed, self._resumed = self._resumed, {}
        checkpoints.put_training_weights(resumed, trainer, pl_module)
        self._masks.follow()  # strategies that shard have put other parameters in place
        begins_with, self._begins_with = self._begins_with, {}
        gradients: dict[str, Tensor] = begins_with.get("gradients", {})
        state.set_gradients(pl_module, gradients)
        if self._passes is not None and gradients:
            self._passes.load_state_dict(begins_with.get("window") or {"complete": False, "window": []})
        for run in self.runs.values():
            run.begin()
            run.trains()
        if not any(word.startswith("sharded") for word in strategies.imposed(trainer.strategy)):
            replaced = any("loss" in type(one).technique.touches("replaces") for one in self.techniques)
            self._gradients = GradientCheck(pl_module, all_of_it=not replaced)
        super().on_train_start(trainer, pl_module)
        for begin in self._wiring.at("begin_samples"):
            begin()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._gradients is not None:
            self._gradients.end()
        self.standing.freeze()  # a checkpoint that is written after this, or after a test, is of this moment
        super().on_train_end(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.progress.before_batch(trainer, batch_idx)
        if self._passes is not None and self.progress.at_boundary:
            self._passes.begin_window()
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        pass  # Wiring.moments calls _batch_ended: before any callback, which may save

    def _batch_ended(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.progress.after_batch(trainer, batch)
        self.standing.batch_ended()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pass  # Wiring.moments calls _epoch_ended

    def _epoch_ended(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.standing.epoch_ended()
        super().on_train_epoch_end(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if self._passes is not None:
            self._passes.optimizer = optimizer
        if self._gradients is not None:
            self._gradients.look(optimizer)
        for act in self._before_step:
            act(optimizer)
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
