"""What a training step will need, before it is launched: the user's own step in a dry run that computes nothing.

A Trainer runs two steps of the model under torch's fake tensors, which have a shape and no content, with as many
processes as asked for, all but one of them made up. Strategy, precision, accumulation and techniques are those of the
run itself, so that nothing has to be known about them here. Each allocation of the second step is taken down; by when
it was made and how long it lived it counts as one cause or another.
"""

from __future__ import annotations

import gc
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from eke import compat
from eke.seams.wrapped import OptimizerWrapper, walk
from eke.spec import EkeError
from eke.technique import TechniqueCallback
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, Dataset

CAUSES = ("parameters", "gradients", "optimizer", "activations", "temporary")
STEPS = 2  # of a dry run: the first makes the optimizer's states
HOST = "host"  # what lies in CPU memory beside a card
RUN = 1000  # steps of the run of which a dry run is the beginning or the end


class ForecastError(EkeError):
    """The step cannot be run without values, or at all."""


@dataclass(frozen=True)
class Forecast:
    """Peak memory of one process.

    Attributes:
        peak: Each of :data:`CAUSES` to its bytes at the moment of the highest total. ``"parameters"`` holds buffers and
            gathered weights too; ``"activations"`` what is kept from forward to backward, and the batch.
        held: The same between two steps.
        host: Bytes that the strategy keeps in CPU memory beside a card; part of neither ``peak`` nor ``held``.
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
    **options: Any,
) -> Forecast:
    """Forecast the peak memory of one process in a training step.

    Nothing is computed but one operator of each small kind, to see what its kernel takes for itself, and next to no
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
        options: Further arguments of the Trainer, such as ``precision``.

    Raises:
        ForecastError: the step reads values of tensors, or fails; the message says where.
    """
    kernels = Scratch()
    found = None
    for moment in ("beginning", "end"):
        one, scheduled = _dry_run(moment, kernels, build, techniques, ranks, batch_size, length, accumulate, options)
        found = one if found is None or one.total > found.total else found
        if not scheduled:  # nobody is here who does other things later
            break
    return found


def _dry_run(
    moment: str, kernels: Scratch, build: Any, techniques: Any, ranks: int, batch_size: int | None, length: int | None,
    accumulate: int, options: dict[str, Any],
) -> tuple[Forecast, bool]:  # fmt: skip
    """Run two steps at the beginning or at the end of a run; and whether any technique may tell the two apart."""
    timeline = Timeline(scratch=kernels)
    begin = 0 if moment == "beginning" else RUN - STEPS
    with (
        _processes(ranks),
        FakeTensorMode(allow_non_fake_inputs=True) as fake,
        timeline,
        _movable(),
        _quiet(),
        _collecting_nothing(),
    ):
        try:
            model, given = build()
            batch = resized(_first(given), batch_size, length)
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
            trainer.strategy.setup_environment = _really(trainer.strategy.setup_environment)
            compat.expect_no_signals(trainer)
            compat.start_at(trainer, begin)
            meter.buckets = compat.leave_ddp_out(trainer.strategy)
            trainer.fit(model, batches(batch, RUN * accumulate))
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ForecastError(
                f"the step depends on values of tensors ({error.func}), which a dry run does not have: {_where(error)}"
            ) from error
        return meter.result(model, ranks), scheduled


def first_size(build: Callable[[], tuple[LightningModule, Any]]) -> int:
    """How many samples the batch has that ``build`` gives."""
    with FakeTensorMode(allow_non_fake_inputs=True), _quiet():
        tensors = [leaf for leaf in tree_leaves(_first(build()[1])) if isinstance(leaf, Tensor) and leaf.ndim]
    return len(tensors[0]) if tensors else 1


def resized(batch: Any, batch_size: int | None, length: int | None) -> Any:
    """A batch with another number of samples, or of tokens in a sample.

    Raises:
        ForecastError: it holds no tensor, or none of integers whose second dimension would be the tokens.
    """
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
    if not tensors:
        raise ForecastError(f"the batch is a {type(batch).__name__} without tensors, which has no size to change.")
    samples = len(tensors[0])
    tokens = next((t.shape[1] for t in tensors if t.ndim > 1 and not t.is_floating_point()), None)
    if length is not None and tokens is None:
        raise ForecastError("length= needs a tensor of integers, tokens, of two dimensions, and the batch holds none.")

    def change(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.ndim or len(leaf) != samples:
            return leaf
        shape = list(leaf.shape)
        shape[0] = batch_size or samples
        if length is not None and leaf.ndim > 1 and shape[1] == tokens:
            shape[1] = length
        return leaf if shape == list(leaf.shape) else leaf.new_zeros(shape)

    return tree_map(change, batch)


@dataclass
class _Life:
    """One allocation: its bytes over time, and what it counts as."""

    size: int
    born: str  # phase
    cause: str = ""


@dataclass
class Timeline(TorchDispatchMode):
    """Takes down every allocation and release of tensors, and reads ones where somebody reads a value.

    Attributes:
        phase: What the run is at: ``"forward"``, ``"backward"``, ``"optimizer"`` or ``""``.
        scratch: Tells what operators take for themselves while they run, which nobody sees from outside.
    """

    phase: str = ""
    events: list[tuple[int, int]] = field(default_factory=list)  # number of a life, and bytes more or less
    lives: list[_Life] = field(default_factory=list)
    alive: dict[int, int] = field(default_factory=dict)  # address of a storage to the number of its life
    scratch: Scratch | None = None
    open: list[tuple[int, Any]] = field(default_factory=list)  # places in events that wait for it

    def __post_init__(self) -> None:
        super().__init__()

    def __enter__(self) -> Timeline:
        self._resize = torch.UntypedStorage.resize_
        timeline = self

        def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            before = storage.nbytes()
            result = timeline._resize(storage, size)
            number = timeline.alive.get(storage._cdata)
            if number is None:
                timeline._begin(storage)
            elif size != before:
                timeline.events.append((number, size - before))
            if size > before:  # how FSDP gathers and lets go of weights, and nobody else does
                timeline.lives[timeline.alive[storage._cdata]].cause = "parameters"
            return result

        torch.UntypedStorage.resize_ = resize_
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind not in _PLAIN for kind in types):
            return NotImplemented  # a wrapper around tensors: what it does with them comes by here again
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            known = args[0].constant  # a number that was made into a tensor a moment ago
            return known.item() if known is not None else _one(args[0].dtype)
        if func is torch.ops.aten.equal.default:
            return True
        result = func(*args, **(kwargs or {}))
        self._remember(result)
        if self.scratch is not None and self.phase and (key := self.scratch.ask(func, args, kwargs or {})) is not None:
            self.open.append((len(self.events), key))
            self.lives.append(_Life(0, self.phase, "temporary"))
            self.events += [(len(self.lives) - 1, 0), (len(self.lives) - 1, -1)]
        return result

    def settle(self) -> None:
        """Fill in what kernels take for themselves, once all that is to be known of them is known."""
        known = self.scratch.answer() if self.scratch is not None else {}
        for place, key in self.open:
            self.events[place] = self.events[place][0], known[key]
        self.open = []

    def _remember(self, result: Any) -> None:
        if isinstance(result, Tensor):
            self._see(result)
        elif isinstance(result, (tuple, list)):
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._see(leaf)

    def _see(self, tensor: Tensor) -> None:
        if type(tensor) not in _PLAIN:
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self.alive:
            self._begin(storage)

    def _begin(self, storage: torch.UntypedStorage) -> None:
        size, key, number = storage.nbytes(), storage._cdata, len(self.lives)
        self.lives.append(_Life(size, self.phase))
        self.events.append((number, size))
        self.alive[key] = number
        weakref.finalize(storage, self._end, key, weakref.ref(storage))

    def _end(self, key: int, _: Any) -> None:
        number = self.alive.pop(key, None)
        if number is not None:
            self.events.append((number, -1))  # all that it has then

    def note(self, tree: Any, cause: str) -> None:
        """Say what the tensors in a structure count as."""
        for leaf in tree_leaves(tree):
            for tensor in _inside(leaf) if isinstance(leaf, Tensor) else ():
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self._begin(storage)
                self.lives[self.alive[storage._cdata]].cause = cause

    def call_living(self, cause: str, born: str) -> None:
        """What was made in a phase, and is still there, counts as this."""
        for number in self.alive.values():
            life = self.lives[number]
            if life.born == born and not life.cause:
                life.cause = cause

    def peak(self, begin: int, end: int) -> dict[str, int]:
        """Bytes by cause at the highest total between two places in ``events``."""
        now: dict[int, int] = {}
        total = highest = 0
        at: dict[int, int] = {}
        rising = False
        for place, (number, more) in enumerate(self.events[:end]):
            if not self._counts(number):
                continue
            before = now.get(number, 0)
            after = 0 if more == -1 else before + more
            if place >= begin and rising and after < before and total > highest:
                highest, at = total, dict(now)
            rising = after >= before
            total += after - before
            if after:
                now[number] = after
            else:
                now.pop(number, None)
        if total > highest:
            at = now
        found = dict.fromkeys(CAUSES, 0)
        for number, size in at.items():
            found[self.lives[number].cause or "temporary"] += size
        return found

    def _counts(self, number: int) -> bool:
        """Whether it is of the step: what was made outside of it, by loaders say, and is nothing known, is not."""
        life = self.lives[number]
        return bool(life.cause or life.born) and life.cause != HOST

    def on_host(self, number: int) -> bool:
        return self.lives[number].cause == HOST


@dataclass(frozen=True)
class _Like:
    """What a tensor was like that an operator got."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def zeros(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype).zero_()


class Scratch:
    """What CPU kernels take for themselves while they run: each is run once, for real, on zeros of the same shape.

    Large operators are left out, whose time it would take and who take little in proportion.
    """

    LARGEST = 2**26  # bytes of an operator's tensors

    def __init__(self) -> None:
        self.known: dict[Any, int] = {}
        self.asked: dict[Any, tuple[Any, Any]] = {}

    def ask(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A key under which :meth:`answer` will know the bytes; None where there is nothing to be known."""
        if func._schema.is_mutable or func.is_view or func.namespace != "aten":
            return None
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        size = sum(leaf.numel() * leaf.element_size() for leaf in tensors)
        if not 0 < size <= self.LARGEST or any(type(leaf) is not FakeTensor for leaf in tensors):
            return None

        def like(leaf: Any) -> Any:
            return _Like(tuple(leaf.shape), leaf.stride(), leaf.dtype) if isinstance(leaf, Tensor) else leaf

        given = tree_map(like, (args, kwargs))
        key = (func, *(leaf if isinstance(leaf, _Like) else repr(leaf) for leaf in tree_leaves(given)))
        if key not in self.known:
            self.asked[key] = (func, given)
        return key

    def answer(self) -> dict[Any, int]:
        """Run what was asked for. Returns key to bytes."""
        with compat.unset_fake_temporarily(), torch.random.fork_rng(devices=[]), torch.no_grad(), _without_stderr():
            with compat.memory_profile() as profiled:
                for key, (func, given) in self.asked.items():
                    args, kwargs = tree_map(lambda leaf: leaf.zeros() if isinstance(leaf, _Like) else leaf, given)
                    self.known[key] = 0
                    try:
                        with profiled.part(key):
                            result = func(*args, **kwargs)
                    except (RuntimeError, NotImplementedError, IndexError):
                        continue  # zeros are not to its taste
                    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                            for t in tree_leaves(result) if isinstance(t, Tensor)}  # fmt: skip
                    self.known[key] = -sum(kept.values())
                    del result, args, kwargs
            for key, peak in profiled.peaks.items():
                self.known[key] = max(0, self.known[key] + peak) if self.known[key] else 0
        self.asked = {}
        return self.known


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


def _really(function: Callable[[], Any]) -> Callable[[], Any]:
    """Call something with real tensors: who is who among the processes is a tensor, and has to be read."""

    def call() -> Any:
        with compat.unset_fake_temporarily():
            return function()

    return call


def batches(batch: Any, count: int) -> Iterable[Any]:
    """The same batch, a number of times: in a ``DataLoader`` where it can be put together again from samples."""
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    plain = type(batch) in (tuple, list, dict, Tensor, FakeTensor) and len(tensors) == len(tree_leaves(batch))
    if plain and tensors and all(leaf.ndim and len(leaf) == len(tensors[0]) for leaf in tensors):
        samples = len(tensors[0])
        return DataLoader(_Samples(batch, count * samples), samples)
    return _Batches(batch, count)


class _Samples(Dataset):
    """The first sample of a batch, a number of times."""

    def __init__(self, batch: Any, count: int) -> None:
        self.batch, self.count = batch, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return tree_map(lambda leaf: leaf[0], self.batch)


class _Batches:
    """The same batch, a number of times. A list would be taken for several loaders."""

    def __init__(self, batch: Any, count: int) -> None:
        self.batch, self.count = batch, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        return iter([self.batch] * self.count)


def _states(optimizer: Any) -> Iterator[Tensor]:
    """All tensors that an optimizer, and those inside it, keep."""
    for one in walk(optimizer):
        yield from (leaf for leaf in tree_leaves(list(one.state.values())) if isinstance(leaf, Tensor))
        if isinstance(one, OptimizerWrapper):
            yield from one.host_tensors()


def _inside(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor consists of."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            part = getattr(tensor, name)
            if isinstance(part, Tensor):  # a sharded one names its processes as well
                yield from _inside(part)
    else:
        yield tensor


_PLAIN = frozenset((Tensor, FakeTensor, nn.Parameter, nn.Buffer))


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Keep torch's profiler, which writes two lines by itself, from the terminal."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _one(dtype: torch.dtype) -> Any:
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


def _first(given: Any) -> Any:
    if isinstance(given, (Tensor, dict, tuple)) or (isinstance(given, list) and given and isinstance(given[0], Tensor)):
        return given
    return next(iter(given))


def _fake(leaf: Any, mode: FakeTensorMode) -> Any:
    return mode.from_tensor(leaf) if isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor) else leaf


def _where(error: BaseException) -> str:
    """The last line of the user's own, or of a technique's, that led to an error."""
    trace, found = error.__traceback__, ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "site-packages/torch/" not in file and "site-packages/lightning/" not in file and file != __file__:
            found = f"{file}, line {trace.tb_lineno}"
        trace = trace.tb_next
    return found


@contextmanager
def _processes(ranks: int) -> Iterator[None]:
    """Pretend to be the first of several processes, each of which does what this one does."""
    if torch.distributed.is_initialized():
        raise ForecastError("a process group exists already: forecast before the run, not inside of it.")
    settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0",
                "NODE_RANK": "0", "LOCAL_WORLD_SIZE": str(ranks)}  # fmt: skip
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    compat.start_fake_processes(ranks)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
        compat.forget_processes()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


@contextmanager
def _movable() -> Iterator[None]:
    """Let modules be moved, cast and copied, which torch does by exchanges that fake tensors refuse."""
    original = nn.Module._apply

    def apply(module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        made: dict[int, Tensor] = {}

        def converted(tensor: Tensor) -> Tensor:
            if id(tensor) not in made:
                with torch.no_grad():
                    new = convert(tensor)
                same = new is tensor or (new.dtype == tensor.dtype and new.device == tensor.device)
                if not same and isinstance(tensor, nn.Parameter):
                    new = nn.Parameter(new, tensor.requires_grad)
                made[id(tensor)] = tensor if same else new
            return made[id(tensor)]

        for part in module.modules() if recurse else (module,):
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = converted(tensor)
        return module

    def copied(tensor: FakeTensor, memo: dict[int, Any]) -> Tensor:
        if id(tensor) not in memo:
            with torch.no_grad():
                new = tensor.detach().clone()
            memo[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
        return memo[id(tensor)]

    nn.Module._apply = apply
    FakeTensor.__deepcopy__ = copied
    try:
        yield
    finally:
        nn.Module._apply = original
        del FakeTensor.__deepcopy__


@contextmanager
def _collecting_nothing() -> Iterator[None]:
    """Keep Python's collector off: what waits for it may wait for the whole step, and it comes when it likes."""
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def _quiet() -> Iterator[None]:
    import logging
    import warnings

    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    loggers.append(logging.getLogger("lightning.pytorch.utilities.rank_zero"))
    levels = [logger.level for logger in loggers]
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
