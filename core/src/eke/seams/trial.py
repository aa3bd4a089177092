"""Try, measure, roll back: some steps of the run at hand, after which nothing has happened; and measuring in turns.

The tricks it hides: a step changes more than weights: moments, batch statistics, metrics, the scaler, what techniques
remember, and random states. Other objects point at all of these, so they are put back in place, inside the same
tensors and containers. And on a machine that others use too, only blocks measured in turns can be compared, against
what two equal blocks differ by.
"""

from __future__ import annotations

import random
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from eke import compat, measure
from eke.seams.state import rng_state, set_rng_state
from eke.seams.step import loss_of, muted, step_arguments
from eke.spec import EkeError

if TYPE_CHECKING:
    from eke.technique import TechniqueCallback

# Objects of these packages are not looked into, unless they are modules, optimizers, or what was asked for itself.
CLOSED = ("lightning", "lightning_fabric", "pytorch_lightning", "logging", "threading", "multiprocessing", "weakref")
CLOSED_IN_TORCH = ("torch.utils.data", "torch.distributed", "torch._", "torch.fx")


class TrialError(EkeError, ValueError):
    """Steps of this run cannot be tried."""


class Snapshot:
    """Everything that hangs on some objects, as it is now: tensors, containers, attributes, generators, modes.

    It is put back in place: each object is the same one afterwards, so that whatever points at it sees the old content.
    Loaders, data sets and the Trainer are not looked into, and neither are functions.

    Args:
        roots: Modules, optimizers, techniques, or anything that holds such.
        light: Tensors whose values will not change: of them only gradient and ``requires_grad`` are kept.
        device: Where copies of tensors wait, such as ``"cpu"``. By default beside them.
    """

    def __init__(self, *roots: Any, light: Iterable[Tensor] = (), device: torch.device | str | None = None) -> None:
        self.device = device
        self._light = {id(one) for one in light}
        self._seen: dict[int, Any] = {}  # keeps them alive, so that no other object takes over an id
        self._undo: list[Callable[[], None]] = []
        for root in roots:
            self._look(root, root=True)

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back, bit for bit. May be called again."""
        for undo in self._undo:
            undo()

    def _look(self, value: Any, root: bool = False) -> None:
        waiting = [(value, root)]
        while waiting:  # not by recursion: lists of blocks are long, and attributes go deep
            value, root = waiting.pop()
            if id(value) in self._seen or isinstance(value, _PLAIN):
                continue
            self._seen[id(value)] = value
            waiting += [(one, False) for one in self._keep(value, root)]

    def _keep(self, value: Any, root: bool) -> list[Any]:
        """Note how to put one object back, and say what hangs on it."""
        if isinstance(value, Tensor):
            return self._keep_tensor(value)
        if isinstance(value, torch.Generator):
            self._undo.append(_later(value.set_state, value.get_state()))
        elif isinstance(value, random.Random):
            self._undo.append(_later(value.setstate, value.getstate()))
        elif isinstance(value, dict):
            self._undo.append(_later(_fill_dict, value, list(value.items())))
            return [*value.keys(), *value.values()]
        elif isinstance(value, (list, deque)):
            self._undo.append(_later(_fill_list, value, list(value)))
            return list(value)
        elif isinstance(value, set):
            self._undo.append(_later(_fill_set, value, set(value)))
            return list(value)
        elif isinstance(value, (tuple, frozenset)):
            return list(value)
        elif type(value).__module__.partition(".")[0] == "numpy":
            self._keep_numpy(value)
        elif root or _open(value):
            attributes = getattr(value, "__dict__", None)
            if isinstance(attributes, dict):
                self._undo.append(_later(_fill_dict, attributes, list(attributes.items())))
                return list(attributes.values())
        return []

    def _keep_tensor(self, tensor: Tensor) -> list[Any]:
        inside = []
        if type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "__tensor_flatten__"):
            inside = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]  # sharded or quantized
        elif id(tensor) not in self._light and not _fixed(tensor):
            copy = tensor.detach().to(self.device or tensor.device, copy=True)
            self._undo.append(_later(_fill_tensor, tensor, copy))
        if tensor.is_leaf:
            self._undo.append(_later(_set_flags, tensor, tensor.requires_grad, tensor.grad))
            inside.append(tensor.grad)
        return inside

    def _keep_numpy(self, value: Any) -> None:
        import numpy

        if isinstance(value, numpy.ndarray) and value.flags.writeable and value.dtype != object:
            self._undo.append(_later(value.__setitem__, ..., value.copy()))
        elif isinstance(value, numpy.random.RandomState):
            self._undo.append(_later(value.set_state, value.get_state()))
        elif isinstance(value, numpy.random.Generator):
            self._undo.append(_later(setattr, value.bit_generator, "state", value.bit_generator.state))


_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size,
    types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, DataLoader, Dataset, Trainer,
)  # fmt: skip


def _open(value: Any) -> bool:
    if isinstance(value, (nn.Module, Optimizer)):
        return True
    place = type(value).__module__
    return place.partition(".")[0] not in CLOSED and not place.startswith(CLOSED_IN_TORCH)


def _fixed(tensor: Tensor) -> bool:
    """Whether a tensor cannot be written to: a broadcast one is changed through what it is a view of."""
    broadcast = any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))
    return broadcast or tensor.is_inference() or tensor.is_meta or (tensor.requires_grad and not tensor.is_leaf)


def _later(function: Callable[..., Any], *args: Any) -> Callable[[], None]:
    return lambda: function(*args)


def _fill_tensor(tensor: Tensor, value: Tensor) -> None:
    if tensor.shape == value.shape and tensor.dtype == value.dtype:
        tensor.copy_(value)
    else:  # somebody gave it other contents altogether
        tensor.data = value.to(tensor.device, copy=True)


def _set_flags(tensor: Tensor, requires_grad: bool, gradient: Tensor | None) -> None:
    tensor.requires_grad_(requires_grad)
    tensor.grad = gradient


def _fill_dict(target: dict[Any, Any], items: list[tuple[Any, Any]]) -> None:
    now = target.items()
    if len(now) == len(items) and all(a is c and b is d for (a, b), (c, d) in zip(now, items, strict=True)):
        return
    kind = OrderedDict if isinstance(target, OrderedDict) else dict  # not a subclass's own, which may do more
    kind.clear(target)
    kind.update(target, items)


def _fill_list(target: Any, items: list[Any]) -> None:
    if len(target) != len(items) or any(a is not b for a, b in zip(target, items, strict=True)):
        target.clear()
        target.extend(items)


def _fill_set(target: set[Any], items: set[Any]) -> None:
    if target != items:
        target.clear()
        target.update(items)


def of_run(trainer: Trainer) -> list[Any]:
    """What a step of a run changes, for :class:`Snapshot`: module, optimizers, schedulers, scaler, techniques."""
    strategy = trainer.strategy
    own = [one for one in trainer.callbacks if type(one).__module__.partition(".")[0] == "eke"]
    schedulers = [config.scheduler for config in strategy.lr_scheduler_configs]
    return [strategy.lightning_module, *strategy.optimizers, *schedulers, trainer.precision_plugin, *own]


@contextmanager
def rolled_back(trainer: Trainer, device: torch.device | str | None = None) -> Iterator[None]:
    """Put back, when the block ends or fails, whatever it changed in a run: as if it had not been.

    Not what lies outside of the process, and not what :class:`Snapshot` does not look into. Nothing is logged inside.

    Args:
        trainer: In ``fit``, between two steps.
        device: Where copies wait; with ``"cpu"`` they take no memory of the GPU.
    """
    snapshot, random_state = Snapshot(*of_run(trainer), device=device), rng_state()
    try:
        with muted(trainer.lightning_module):
            yield
    finally:
        snapshot.restore()
        set_rng_state(random_state)


# ------------------------------------------------------------------ a trial


@dataclass
class Trial:
    """What some steps took.

    Attributes:
        seconds: Of each step, without those that warmed up.
        losses: Of each step, all of them.
        memory: Bytes at the peak of one more step, by cause, as :func:`eke.measure.memory_peak` counts them; None where
            compiled code cannot be counted.
    """

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    memory: dict[str, int] | None = None


def trial(
    trainer: Trainer,
    windows: Sequence[Sequence[Any]],
    *,
    warmup: int = 1,
    memory: bool = True,
    device: torch.device | str | None = None,
) -> Trial:
    """Take steps of the run at hand, measure them, and put everything back.

    Args:
        trainer: In ``fit``, between two steps, with one optimizer.
        windows: For each step the batches that it accumulates, as the loader gives them:
            ``sample_batches(trainer, n, on_device=False)``.
        warmup: Steps at the beginning that are not timed: they compile, and make the optimizer's states.
        memory: Take one more step, of the last window, to count its memory.
        device: Where the copies wait, see :func:`rolled_back`.

    Raises:
        TrialError: a module that optimizes by hand, a strategy that runs the optimizer itself, or no step to time.
    """
    if len(windows) <= warmup:
        raise TrialError(f"{len(windows)} steps, of which warmup={warmup} are not timed, leave none. Give more.")
    found, module = Trial(), trainer.lightning_module
    now = clock(module.device)
    with rolled_back(trainer, device):
        for number, window in enumerate(windows):
            began = now()
            loss = take_step(trainer, window)
            if number >= warmup:
                found.seconds.append(now() - began)
            found.losses.append(float(loss))
        if memory and not compiled(module):
            with measure.tracked_memory(module, *trainer.optimizers) as peak:
                take_step(trainer, windows[-1])
            found.memory = peak
    return found


def take_step(trainer: Trainer, window: Sequence[Any]) -> Tensor:
    """One optimizer step as the run takes it: with its strategy, precision, clipping and techniques.

    Lightning's own counters do not move, schedulers are not stepped, and callbacks outside of Eke see the optimizer's
    step alone.

    Args:
        trainer: In ``fit``, between two steps.
        window: Batches to accumulate, as the loader gives them.

    Returns:
        The mean loss, detached.

    Raises:
        TrialError: a module that optimizes by hand, or a strategy that runs the optimizer itself.
    """
    module, strategy = trainer.lightning_module, trainer.strategy
    check_steppable(trainer, "a step")
    optimizer = module.optimizers()
    own = [one for one in trainer.callbacks if type(one).__module__.partition(".")[0] == "eke"]
    losses: list[Tensor] = []

    def one_pass(number: int) -> Tensor:
        batch = to_device(trainer, window[number])
        for callback in own:
            callback.on_train_batch_start(trainer, module, batch, number)
        output = strategy.training_step(*step_arguments(module, batch, number))
        if output is None:
            raise TrialError("training_step returned None, which skips a step: there is nothing to measure.")
        loss = loss_of(output)
        if number == 0:
            module.optimizer_zero_grad(trainer.current_epoch, number, optimizer)
        losses.append(loss.detach())
        strategy.backward(loss / len(window), optimizer)
        ends.append((output, batch))
        return loss

    ends: list[tuple[Any, Any]] = []
    for number in range(len(window)):
        if number < len(window) - 1:
            with getattr(strategy, "block_backward_sync", nullcontext)():
                one_pass(number)
        else:
            module.optimizer_step(trainer.current_epoch, number, optimizer, lambda number=number: one_pass(number))
        for callback in own:
            callback.on_train_batch_end(trainer, module, *ends[-1], number)
    return torch.stack(losses).mean()


def check_steppable(trainer: Trainer, what: str) -> None:
    """Refuse a run whose steps only itself can take.

    Raises:
        TrialError: see above.
    """
    module = trainer.lightning_module
    if not module.automatic_optimization:
        raise TrialError(
            f"{type(module).__name__} optimizes by hand (automatic_optimization=False), within training_step: {what} "
            "cannot be taken apart from it. Let Lightning optimize."
        )
    if trainer.strategy.handles_gradient_accumulation:
        raise TrialError(
            f"{type(trainer.strategy).__name__} runs backward and the optimizer in an engine of its own, whose state "
            f"cannot be put back: {what} is not tried. Use another strategy for it."
        )


def to_device(trainer: Trainer, batch: Any) -> Any:
    """A batch as the loader gave it, as ``training_step`` gets it: cast, moved, changed by techniques."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = compat.before_batch_transfer(trainer, batch)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def compiled(module: nn.Module) -> bool:
    """Whether a part of a module is compiled: its operators cannot be counted, and each switch compiles it again."""
    return getattr(module, "_compiler_ctx", None) is not None or any(
        compat.is_compiled(part) or hasattr(part, "_orig_mod") for part in module.modules()
    )


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds, read when what was asked of a device is done."""
    if device.type != "cuda":
        return perf_counter

    def now() -> float:
        torch.cuda.synchronize(device)
        return perf_counter()

    return now


# ------------------------------------------------------------------ switching


def switch_off(technique: TechniqueCallback) -> None:
    """Let a run go on as if a technique were not in it: its run ends, and nothing of it is called. In ``fit``, between
    two batches.

    For one that acts on the model, the batch and the step. What it has put into optimizers and loaders is still there.
    """
    technique._coordinator.pause(technique)


def switch_on(technique: TechniqueCallback) -> None:
    """Take up again a technique that was switched off, as a resumed run takes it up."""
    technique._coordinator.resume(technique)


# ------------------------------------------------------------------ measuring in turns

# The two that are alike are the control of the round (A/A), and the order turns around in the next one.
EVEN, ODD = ("on", "off", "off", "on"), ("off", "on", "on", "off")


def turns(number: int) -> tuple[str, str, str, str]:
    """Which of the two is measured in the four blocks of a round, by the round's number from 0 on."""
    return EVEN if number % 2 == 0 else ODD


def interleave(on: Callable[[], float], off: Callable[[], float], rounds: int) -> list[list[float]]:
    """Measure two things in turns, for :func:`compare`.

    Args:
        on: Measures the one, such as the median time of some steps with a technique.
        off: Measures the other.
        rounds: Each measures both twice.
    """
    measures = {"on": on, "off": off}
    return [[measures[state]() for state in turns(number)] for number in range(rounds)]


def compare(rounds: list[list[float]], least: float = 0.02) -> dict[str, Any]:
    """What switching something on did, from measurements in turns.

    A drift of the machine that is even within a round cancels.

    Args:
        rounds: For each round what was measured in its four blocks, in the order of :func:`turns`. Two or more.
        least: A ratio nearer to 1 than this is never called a difference.

    Returns:
        ``step_ratio``: with it over without it, ``[median, least, most]`` over the rounds; ``control``: the same of
        blocks that were alike; ``told_apart``: whether the ratio lies outside the control in every round, on one side,
        and further than ``least`` from 1.
    """
    ratios, control = [], []
    for number, (a, b, c, d) in enumerate(rounds):
        outer, inner = (a + d) / 2, (b + c) / 2
        ratios.append(outer / inner if turns(number)[0] == "on" else inner / outer)
        control += [a / d, b / c]
    return {
        "measured": True,
        "rounds": len(rounds),
        "step_ratio": [median(ratios), min(ratios), max(ratios)],
        "control": [median(control), min(control), max(control)],
        "told_apart": differ(ratios, control, least),
    }


def differ(ratios: Sequence[float], control: Sequence[float], least: float = 0.02) -> bool:
    """Whether all of some ratios lie further from 1, on one side, than any ratio of two equal things does."""
    reach = max(*(abs(one - 1) for one in control), least)
    return all(ratio > 1 + reach for ratio in ratios) or all(ratio < 1 - reach for ratio in ratios)
