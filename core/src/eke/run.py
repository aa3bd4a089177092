"""One run of a Trainer, as a technique sees it: who trains what, how far it is, and what is undone at its end."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from eke.seams import growth, interceptor
from eke.seams.blocks import Blocks, find_all_blocks
from eke.seams.data import Position
from eke.seams.masks import Masks
from eke.seams.passes import Passes
from eke.seams.progress import Progress, Until
from eke.seams.saved import Saved
from eke.seams.schedulers import scale_group
from eke.seams.step import log_own
from eke.seams.terms import LossTerms
from eke.spec import EkeError

if TYPE_CHECKING:
    from eke.technique import TechniqueCallback

T = TypeVar("T")

IN_RUN = "_in_run"  # where a technique holds what belongs to the run

# Which modules a Trainer of this process has begun to train. Not a mark on the module: that would outlive the run.
_trained: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass
class Shared:
    """What the techniques of one run have in common. Terms and passes are there if a record asks for them."""

    progress: Progress
    masks: Masks
    saved: Saved
    terms: LossTerms | None = None
    passes: Passes | None = None
    position: Position = field(default_factory=Position)


class Run:
    """Made for each technique when a run opens, dropped when it closes; never copied or pickled.

    Attributes:
        trainer: The Trainer; None where a model is shaped without one, as in ``load_from_checkpoint``.
        module: The user's LightningModule.
        stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        progress: Steps, samples, tokens and share of the run that are done.
        position: Of the training data. ``run.position.loads`` tells loaders that come together from those that replace
            them: it counts how often the run has asked for its loaders.
        masks: On weights, of all techniques: ``run.masks.claim(run.name, ...)``. A technique that claims some declares
            ``"changes weights"``; gradients are masked after all of ``before_optimizer_step`` and before clipping.
        saved: What autograd keeps for backward in a training step: ``run.saved.register(run.name, codec, COMPRESS)``.
            A technique that registers a codec declares ``"changes saved tensors"``.
        paused: Nothing of the technique is called, see :func:`eke.seams.trial.switch_off`.
    """

    def __init__(
        self,
        technique: TechniqueCallback,
        trainer: Trainer | None,
        module: LightningModule,
        stage: str = "fit",
        shared: Shared | None = None,
    ) -> None:
        self.trainer, self.module, self.stage = trainer, module, stage
        shared = shared or Shared(Progress(), Masks(module), Saved(module))
        self.progress, self.masks, self.saved = shared.progress, shared.masks, shared.saved
        self.paused = False
        self.position = shared.position
        self._technique, self._terms, self._passes = technique, shared.terms, shared.passes
        self._points: list[Until] = []
        self._undo: list[Callable[[], Any]] = []

    # ------------------------------------------------------------------ who and where

    @property
    def name(self) -> str:
        """Of the technique."""
        return type(self._technique).technique.name

    @property
    def fitting(self) -> bool:
        """Whether the run trains."""
        return self.stage == "fit"

    @property
    def rank(self) -> int:
        """Number of this process, 0 where there is one."""
        return self.trainer.global_rank if self.trainer is not None else 0

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.trainer.world_size if self.trainer is not None else 1

    @property
    def device(self) -> torch.device:
        """On which this process trains."""
        return self.trainer.strategy.root_device if self.trainer is not None else self.module.device

    @property
    def fresh(self) -> bool:
        """Whether training starts from weights that no run has trained: not resumed, not fitted before. Lightning knows
        it from ``initialize`` on."""
        resumes = self.trainer is not None and self.trainer.ckpt_path is not None
        return self.fitting and not resumes and self.module not in _trained

    def writers(self, resource: str) -> list[str]:
        """Names of the other techniques of the run that replace or change a resource: ``run.writers("weights")``. For
        whoever relies on what is there, such as one that leaves weights out of checkpoints since they do not train."""
        from eke.technique import techniques

        others = [type(one).technique for one in techniques(self.trainer)] if self.trainer is not None else []
        writing = [one for one in others if resource in one.touches("replaces") | one.touches("changes")]
        return [one.name for one in writing if one.name != self.name]

    # ------------------------------------------------------------------ how far

    @property
    def length(self) -> int:
        """Optimizer steps that the run will have.

        Raises:
            LengthError: that is not known.
        """
        return self.progress.length_for(type(self._technique).__name__)

    def until(self, when: float | int | str, argument: str = "") -> Until:
        """A point of the run: optimizer steps (``500``), a share of it (``0.3``), or words (``"3 epochs"``).

        Made in ``check`` or ``alter_model``, a share of a run of unknown length is refused before the first step.

        Args:
            when: The point.
            argument: Name of the technique's argument that gave it, for errors. Empty where none did, as for the length
                of the run, ``run.until(1.0)``.

        Raises:
            LengthError: no point of a run.
        """
        name = type(self._technique).__name__
        point = Until(self.progress, when, f"{name}({argument}={when!r})" if argument else name, bool(argument))
        self._points.append(point)
        return point

    # ------------------------------------------------------------------ random numbers

    @property
    def generator(self) -> torch.Generator:
        """Random numbers of the technique's own, on the CPU: the same on all processes, saved and resumed."""
        return self._technique.generator

    def seed(self, per_rank: bool = False) -> int:
        """Draw a seed from :attr:`generator`: the same on all processes, or another on each. Either way every process
        draws once, so that they stay together."""
        drawn = int(torch.randint(2**40, (), generator=self.generator))
        return drawn * 4096 + self.rank if per_rank else drawn

    # ------------------------------------------------------------------ the model

    def blocks(
        self, paths: str | Sequence[str | Blocks] | None = None, part: slice = slice(None)
    ) -> interceptor.InterceptedBlocks:
        """Blocks on which the technique may act: those that their lists hold at the moment, also after growth.

        Args:
            paths: Dotted paths of the lists, one or several, as for :func:`eke.seams.blocks.find_all_blocks`; by
                default all of the model. Or what that has found.
            part: Which blocks of each list, such as ``slice(1, -1)`` for all but the first and the last.

        Raises:
            BlocksError: they are not to be found.
        """
        given = not isinstance(paths, str) and paths and all(isinstance(one, Blocks) for one in paths)
        found = paths if given else find_all_blocks(self.module, paths)
        blocks = interceptor.InterceptedBlocks(self.name, found, part)
        self.at_end(blocks.detach)
        return blocks

    def rebuild(self, origin: Mapping[Tensor, Tensor]) -> None:
        """The model has changed its shape: let optimizers, schedules, DDP and masks follow, at the start of a window.

        Args:
            origin: New parameter to the old one that it is a copy of, as for :func:`eke.seams.growth.rebuild`.

        Raises:
            MisconfigurationException: a strategy under which a model cannot grow.
        """
        growth.rebuild(self.trainer, origin)
        self.masks.follow(origin)

    def at_end(self, undo: Callable[[], Any]) -> None:
        """Call ``undo`` when the run closes, also after an exception, last come first: ``run.at_end(hook.remove)``."""
        self._undo.append(undo)

    # ------------------------------------------------------------------ the step

    def add_loss(self, term: Tensor, name: str | None = None) -> None:
        """Add a scalar to the loss of the step at hand. Outside of a training step nothing happens, so that a hook on a
        module may call it in validation too.

        Args:
            term: With graph. The technique declares ``"changes loss"``.
            name: Under which the term is logged, as ``eke/<technique>/<name>``, at the Trainer's interval.

        Raises:
            EkeError: no scalar; a record that does not declare it.
        """
        if self._terms is not None:
            self._terms.add(self.name, term, name)
        elif self.fitting:
            raise EkeError(
                f"{self.name} adds to the loss, which its record does not say: effects=('changes loss', ...)."
            )

    def log(self, name: str, value: Tensor) -> None:
        """Log a number of the step at hand as ``eke/<technique>/<name>``, at the Trainer's interval. For
        ``around_step``; a second pass logs nothing."""
        log_own(self.trainer, self.module, self.name, name, value)

    def once(self, key: str, make: Callable[[], T]) -> T:
        """``make()``, once for the batch at hand: in a second pass the value of the first. For what draws or counts."""
        return make() if self._passes is None else self._passes.once((self.name, key), make)

    @property
    def first_pass(self) -> bool:
        """Not in a second pass over a batch, in which nothing is to be counted again."""
        return self._passes is None or not self._passes.repeating

    def second_pass(self) -> None:
        """The window's gradients once more, at the weights as they are now, in place of those of the first pass.

        For ``before_optimizer_step`` of a technique with ``passes = 2``. The other techniques see one step: batches,
        random numbers and skipped blocks are those of the first pass, batch statistics stay, nothing is logged.
        """
        self._passes.second()

    def scale_lr(self, optimizer: Optimizer, factor: float, group: int | None = None) -> None:
        """Scale the learning rate of an optimizer, or of one of its groups, for good: schedules go on from the scaled
        one. Call it in ``alter_optimizer``."""
        for number, one in enumerate(optimizer.param_groups):
            if group is None or number == group:
                scale_group(one, factor)

    # ------------------------------------------------------------------ the core's

    def begin(self) -> None:
        """Training starts: what was asked for has to make sense now that the length of the data is known."""
        for point in self._points:
            point.check()

    def close(self) -> None:
        """Undo what was noted by :meth:`at_end`."""
        while self._undo:
            self._undo.pop()()

    def trains(self) -> None:
        """The weights are fresh no more."""
        _trained.add(self.module)

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _no_run, ()  # a copy of what refers to a run refers to none


def _no_run() -> None:
    return None


class in_run:
    """An attribute of a technique that belongs to the run that is open, such as what it found in the model at hand: it
    has its first value when a run opens, is forgotten when the run has closed, and is never copied or pickled.

    Example::

        class Skip(TechniqueCallback):
            _until: Until | None = in_run(None)
            _chosen: list[int] = in_run(list)  # a type or function: called for the first value

    Args:
        first: The first value, or what makes it where it is callable.
    """

    def __init__(self, first: Any) -> None:
        self.first = first

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, technique: Any, owner: type | None = None) -> Any:
        if technique is None:
            return self
        held = vars(technique).setdefault(IN_RUN, {})
        if self.name not in held:
            held[self.name] = self.first() if callable(self.first) else self.first
        return held[self.name]

    def __set__(self, technique: Any, value: Any) -> None:
        vars(technique).setdefault(IN_RUN, {})[self.name] = value


def forget_run(technique: Any) -> None:
    """Give all attributes that are :class:`in_run` their first value."""
    vars(technique).pop(IN_RUN, None)
