"""What a training step will need, before it is launched: the user's own step in a dry run that computes nothing.

A Trainer runs two steps of the model under torch's fake tensors, which have a shape and no content, with as many
processes as asked for, all but one of them made up. Strategy, precision, accumulation and techniques are those of the
run itself, so that nothing has to be known about them here. Each allocation of the second step is recorded. Its cause
is read from when in the step it was made and when it was freed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eke import compat
from eke.forecast.batch import batches, built, first, resized
from eke.forecast.errors import ForecastError
from eke.forecast.pretend import collecting_nothing, movable, processes, really
from eke.forecast.scratch import Scratch
from eke.forecast.timeline import HOST, Timeline
from eke.quiet import quiet
from eke.seams.wrapped import OptimizerWrapper, walk
from eke.technique import TechniqueCallback
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._pytree import tree_leaves, tree_map

STEPS = 2  # of a dry run: the first makes the optimizer's states
RUN = 1000  # steps of the run of which a dry run is the beginning or the end
HERE = str(Path(__file__).parent)


@dataclass(frozen=True)
class Forecast:
    """Peak memory of one process.

    Attributes:
        peak: Each of :data:`CAUSES` to its bytes at the moment of the highest total. ``"parameters"`` holds buffers and
            gathered weights too; ``"activations"`` what is kept from forward to backward, and the batch.
        held: The same between two steps.
        host: Bytes that the strategy keeps in CPU memory beside the GPU's; part of neither ``peak`` nor ``held``.
        parameters: Number of parameters of the whole model, and how many of them train.
        ranks: Number of processes.
    """

    peak: Mapping[str, int]
    held: Mapping[str, int]
    host: int = 0
    parameters: tuple[int, int] = (0, 0)
    ranks: int = 1

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.peak.values())


def forecast(
    build: Callable[[], tuple[LightningModule, Any]],
    techniques: Callable[[], Mapping[str, Any]] = dict,
    ranks: int = 1,
    batch_size: int | None = None,
    length: int | None = None,
    accumulate: int = 1,
    device: str = "cpu",
    **options: Any,
) -> Forecast:
    """Forecast the peak memory of one process in a training step.

    Nothing is computed but small operators of each kind, to see what their kernels take for themselves, and next to no
    memory is used, whatever the size of the model. With techniques it is the higher of the first and the last step of
    a run. What is drawn at random, such as the blocks that LayerDrop skips, is as it was drawn.

    Args:
        build: Returns the model and a batch, or something to iterate over that yields one. It is called under fake
            tensors: the weights that it makes take no memory. It must not read values of tensors.
        techniques: Returns Trainer arguments, as :func:`eke.trainer_kwargs` does; called anew for each dry run.
        ranks: Number of processes; under DDP, where neither ``techniques`` nor ``options`` give a strategy.
        batch_size: Samples of a batch instead of those that ``build`` gives: all tensors whose first dimension is that
            of the first are cut or repeated.
        length: Tokens of a sample instead of those that it gives: all tensors whose second dimension is that of the
            first integer tensor.
        accumulate: Batches a step.
        device: What the run will be on. What kernels take for themselves is learned for the CPU alone, by running
            them; for ``"cuda"`` it is left out.
        options: Further arguments of the Trainer, such as ``precision``.

    Raises:
        ForecastError: the step reads values of tensors, or fails; the message says where.
    """
    kernels = Scratch() if device == "cpu" else None
    found = None
    for moment in ("beginning", "end"):
        one, scheduled = _dry_run(moment, kernels, build, techniques, ranks, batch_size, length, accumulate, options)
        found = one if found is None or one.total > found.total else found
        if not scheduled:  # nobody is here who does other things later
            break
    return found


def _dry_run(
    moment: str, kernels: Scratch | None, build: Any, techniques: Any, ranks: int, batch_size: int | None,
    length: int | None, accumulate: int, options: dict[str, Any],
) -> tuple[Forecast, bool]:  # fmt: skip
    """Run two steps at the beginning or at the end of a run; and whether any technique may tell the two apart."""
    timeline = Timeline(scratch=kernels)
    begin = 0 if moment == "beginning" else RUN - STEPS
    with (
        processes(ranks),
        FakeTensorMode(allow_non_fake_inputs=True) as fake,
        timeline,
        movable(),
        quiet(all_warnings=True),
        collecting_nothing(),
    ):
        try:
            model, given = built(build)
            batch = resized(first(given), batch_size, length)
            batch = tree_map(lambda leaf: _fake(leaf, fake), batch)
            settings = {**options, **techniques()}
            meter = _Meter(timeline, accumulate)
            settings["callbacks"] = [*options.get("callbacks", ()), *settings.get("callbacks", ()), meter]
            settings.setdefault("strategy", "ddp" if ranks > 1 else "auto")
            scheduled = any(isinstance(one, TechniqueCallback) for one in settings["callbacks"])
            trainer = Trainer(**{
                "accelerator": "cpu", "devices": ranks, "max_steps": RUN, "accumulate_grad_batches": accumulate,
                "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0,
                "enable_model_summary": False, "num_sanity_val_steps": 0, "use_distributed_sampler": False, **settings,
            })  # fmt: skip
            if isinstance(trainer.strategy, DeepSpeedStrategy):
                raise ForecastError("a dry run cannot follow DeepSpeed into C++: forecast engine='torch'.")
            trainer.strategy.broadcast = lambda value, src=0: value  # there is nobody to read it from
            trainer.strategy.setup_environment = really(trainer.strategy.setup_environment)
            compat.expect_no_signals(trainer)
            compat.start_at(trainer, begin)
            meter.buckets = compat.leave_ddp_out(trainer.strategy)
            trainer.fit(model, batches(batch, RUN * accumulate))
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ForecastError(
                f"the step depends on values of tensors ({error.func}), which a dry run does not have: {_where(error)}"
            ) from error
        return meter.result(model, ranks), scheduled


class _Meter(Callback):
    """Tells a timeline what the run is at."""

    def __init__(self, timeline: Timeline, accumulate: int) -> None:
        self.timeline = timeline
        self.accumulate = accumulate
        self.begin = self.end = self.batches = 0
        self.buckets: list[Tensor] = []  # DDP's
        self.host: tuple[str, ...] = ()

    def _cause(self, cause: str) -> str:
        return HOST if cause in self.host else cause

    def on_train_batch_start(self, trainer: Trainer, model: LightningModule, batch: Any, batch_idx: int) -> None:
        timeline = self.timeline
        timeline.note(batch, "activations")
        self.host = getattr(trainer.strategy, "keeps_on_host", ())
        if self.batches == (STEPS - 1) * self.accumulate:
            timeline.note(list(model.buffers()), "parameters")
            timeline.note(list(model.parameters()), self._cause("parameters"))
            timeline.note([list(_states(one)) for one in trainer.optimizers], self._cause("optimizer"))
            timeline.note(self.buckets, "gradients")
            self.begin = len(timeline.events)
        timeline.phase = "forward"

    def on_before_backward(self, *_: Any) -> None:
        self.timeline.call_living("activations", "forward")
        self.timeline.phase = "backward"

    def on_after_backward(self, *_: Any) -> None:
        self.timeline.call_living(self._cause("gradients"), "backward")
        self.timeline.phase = "optimizer"

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.timeline.call_living("optimizer", "optimizer")
        self.timeline.phase = ""
        self.end = len(self.timeline.events)
        self.batches += 1
        trainer.should_stop = self.batches == STEPS * self.accumulate

    def result(self, model: LightningModule, ranks: int) -> Forecast:
        timeline = self.timeline
        timeline.settle()
        weights = list(model.parameters())
        count = sum(one.numel() for one in weights), sum(one.numel() for one in weights if one.requires_grad)
        held, peak = timeline.peak(self.begin, self.begin), timeline.peak(self.begin, self.end)
        host = sum(timeline.lives[number].size for number in timeline.alive.values() if timeline.on_host(number))
        return Forecast(peak, held, host, count, ranks)


def _states(optimizer: Any) -> Iterator[Tensor]:
    """All tensors that an optimizer, and those inside it, keep."""
    for one in walk(optimizer):
        yield from (leaf for leaf in tree_leaves(list(one.state.values())) if isinstance(leaf, Tensor))
        if isinstance(one, OptimizerWrapper):
            yield from one.host_tensors()


def _fake(leaf: Any, mode: FakeTensorMode) -> Any:
    return mode.from_tensor(leaf) if isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor) else leaf


def _where(error: BaseException) -> str:
    """The last line of the user's own, or of a technique's, that led to an error."""
    trace, found = error.__traceback__, ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "site-packages/torch/" not in file and "site-packages/lightning/" not in file and not file.startswith(HERE):
            found = f"{file}, line {trace.tb_lineno}"
        trace = trace.tb_next
    return found
