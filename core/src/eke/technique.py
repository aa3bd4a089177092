"""The base class of techniques that reach into a run, and of strategies that are techniques."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from eke.coordinator import Coordinator, arguments
from eke.coordinator import checkpoint as checkpoints
from eke.coordinator.opening import overrides
from eke.run import IN_RUN, Run
from eke.seams.progress import Progress
from eke.spec import EkeError, Technique


class TechniqueCallback(Callback):
    """A callback that may reach into a run at Eke's seams. Override what is needed; leave the rest.

    Each method is given the :class:`~eke.run.Run`; in ordinary callback hooks (``on_train_batch_start`` and so on),
    which may be overridden too, it is ``self.run``. ``setup`` and ``teardown`` are the core's. Techniques are called in
    the order that the records of all of them imply for each method, whatever order the user listed them in.

    Class attributes:
        technique: The record.
        counts: ``"samples"`` and ``"tokens"``, if the technique reads them from its progress: counting costs.
        passes: 2 for a method that calls ``run.second_pass()``: the batches of a window are kept until its end.
        writes_files: A run leaves a file of the technique's behind: it is not put into copies of a run.
        version: Of what ``state_dict`` returns. A later version has to read earlier ones.
        may_change: Arguments that a resumed run may have otherwise without a word: what only the machine, the screen,
            evaluation or the end of the run sees. Paths and devices need not be named.
        joins: Whether it may be added to a run that began without it: it reads on what was saved then.
        must_not_change: Arguments by which the state was written: with others it cannot be read on.

    Attributes:
        on_changed_arguments: What becomes of a run that resumes with other arguments than those of the checkpoint, or
            with a technique that was not there: ``"refuse"`` it, or ``"warn"`` and go on as another run.
    """

    technique: ClassVar[Technique]
    counts: ClassVar[tuple[str, ...]] = ()
    passes: ClassVar[int] = 1
    writes_files: ClassVar[bool] = False
    version: ClassVar[int] = 1
    may_change: ClassVar[tuple[str, ...]] = ()
    must_not_change: ClassVar[tuple[str, ...]] = ()
    joins: ClassVar[bool] = False

    on_changed_arguments: Literal["refuse", "warn"] = "refuse"

    _arguments: dict[str, Any] | None = None  # as plain values, taken down when it was built
    _coordinator: Coordinator | None = None
    _generator: torch.Generator | None = None
    _run: Run | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = arguments.noting(cls.__init__)

    # ------------------------------------------------------------------ before the first step

    def check(self, run: Run) -> None:
        """Refuse, in words and before anything is touched, a run that cannot work with the technique."""

    def refuses(self, others: Sequence[Technique]) -> str:
        """Why the technique, with the arguments it has, cannot be in one run with others, and what to do; empty where
        it can. For what effects alone cannot say. ``eke check``, ``eke.trainer_kwargs`` and ``fit`` ask.

        Args:
            others: Records of the other techniques, of strategy and precision too.
        """
        return ""

    def alter_model(self, run: Run) -> None:
        """Change the model once its module tree is built; before weights load, the strategy wraps it or
        optimizers exist. For ``fit``, ``validate``, ``test`` and ``predict``, each time: what is put in for the run is
        undone by ``run.at_end``; what stays, such as new weights, is put in once."""

    def initialize(self, run: Run) -> None:
        """Set the weights with which training begins, after all of ``alter_model``. Only where ``run.fresh``: never for
        a resumed run, one that fits again, validation or testing."""

    def alter_optimizer(self, run: Run, optimizer: Optimizer) -> Optimizer:
        """Replace or wrap one optimizer that ``configure_optimizers`` built. Schedules follow by themselves."""
        return optimizer

    def alter_schedulers(
        self, run: Run, optimizers: list[Optimizer], schedulers: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Replace, add or leave out learning-rate schedules, each a mapping as Lightning takes it from
        ``configure_optimizers``: ``{"scheduler": ..., "interval": "step"}``."""
        return schedulers

    def alter_loader(self, run: Run, loader: Any) -> Any:
        """Change a train loader, after Lightning has put its distributed sampler in. Another may take its place later,
        with ``reload_dataloaders_every_n_epochs`` or Lightning's finders: then ``run.position.loads`` has grown."""
        return loader

    def begin_samples(self, run: Run) -> None:
        """For techniques that change how many batches an epoch has: called when training starts, after all of
        ``on_train_start``, so that what goes by the length of the run goes by its full length, resumed or not."""

    # ------------------------------------------------------------------ a step

    def alter_batch(self, run: Run, batch: Any) -> Any:
        """Change a training batch, once it is on the device."""
        return batch

    def around_step(self, run: Run, call_next: Callable[..., Any], batch: Any, *args: Any) -> Any:
        """Act around ``training_step``; its value is the loss, or what the user returns. A loss term is added by
        ``run.add_loss``; what draws or counts is guarded by ``run.once`` or ``run.first_pass``."""
        return call_next(batch, *args)

    def before_optimizer_step(self, run: Run, optimizer: Optimizer) -> None:
        """Act on the gradients of a whole window, reduced and unscaled, before they are clipped. The place for
        ``run.second_pass()``."""

    def after_optimizer_step(self, run: Run, optimizer: Optimizer) -> None:
        """Act on the weights after each step of an optimizer."""

    def alter_eval_batch(self, run: Run, batch: Any) -> Any:
        """Change a batch of validation or testing, once it is on the device."""
        return batch

    def eval_weights(self) -> Mapping[str, torch.Tensor] | None:
        """Weights that validation and saved models should have in place of the training weights."""
        return None

    def step_kind(self) -> str:
        """What the cost of the coming step depends on, such as ``"4 of 8 blocks"``: benchmarks charge steps by kind."""
        return ""

    # ------------------------------------------------------------------ the end, and checkpoints

    def end_run(self, run: Run) -> None:
        """The run is over, or has failed: undo what should not outlive it and was not given to ``run.at_end``."""

    def manifest(self) -> dict[str, Any] | None:
        """What a fresh process has to know to build the same module tree before weights load."""
        return None

    def shape_from(self, manifest: dict[str, Any], pl_module: LightningModule) -> None:
        """Build the module tree that :meth:`manifest` described."""

    def alter_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Change what is about to be saved, such as leave out weights that did not train."""

    def complete_checkpoint(self, checkpoint: dict[str, Any], pl_module: LightningModule) -> None:
        """Put back what :meth:`alter_checkpoint` left out, after :meth:`shape_from` and before weights load."""

    def on_this_machine(self) -> str:
        """What the technique would take here, and why, for ``eke check``: ``"by torchao (the first that ...)"``.

        Raises:
            EkeError: it cannot run here.
        """
        return ""

    # ------------------------------------------------------------------ given

    @property
    def run(self) -> Run:
        """The run that is open.

        Raises:
            EkeError: none is.
        """
        if self._run is None:
            raise EkeError(f"{type(self).__name__} is in no run: ask for one inside of Trainer.fit, validate or test.")
        return self._run

    @property
    def progress(self) -> Progress:
        """Steps, batches, samples and tokens done so far, also after the run."""
        return self._coordinator.progress if self._coordinator is not None else Progress()

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
        return {key: value for key, value in vars(self).items() if key not in ("_coordinator", "_run", IN_RUN)}


class TechniqueStrategy:
    """Inherit it before one of Lightning's strategies: a run then keeps its data order, its random state and the
    gradients of a window that is cut in two across a resume, with or without a callback of Eke.

    Example::

        class Sharded(TechniqueStrategy, ModelParallelStrategy):
            technique = RECORD

    Class attributes:
        technique: The record.
        shards_in_setup: It shards the model itself, after techniques have changed it and not in ``configure_model``.
    """

    technique: ClassVar[Technique]
    shards_in_setup: ClassVar[bool] = False

    def connect(self, model: LightningModule) -> None:
        super().connect(model)
        Coordinator.of(model.trainer)  # the first moment that belongs to the run, and before any callback is set up


def techniques(trainer: Trainer) -> list[TechniqueCallback]:
    """The Eke techniques of a Trainer, in the order in which they act."""
    if not any(isinstance(one, (TechniqueCallback, Coordinator)) for one in trainer.callbacks):
        return []  # and no coordinator: a run that has begun without one would call one that was never set up
    return list(Coordinator.of(trainer).techniques)


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
            written = (checkpoints.read(checkpoint) or {}).get("techniques", {})
            for name, technique in given.items():  # a file saved after the run, of weights only, says nothing of them
                shapes = isinstance(technique, TechniqueCallback) and overrides(technique, "manifest")
                if name not in written and shapes:
                    technique.alter_model(Run(technique, None, self))
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
