"""Compute blocks a second time in backward instead of keeping what lies inside them: one block, or several as one.

The tricks it hides. A region of one block is a wrapped ``forward``: hooks of FSDP2 and of the user stay outside it, and
a compiled block is compiled with it. A region of several blocks would need the model's own loop, which nobody here can
edit, since each block's side inputs (masks, rotary tables) are known only when the loop calls it. So each block but
the last of a region only takes down its inputs and returns a tensor that is computed later; the last one runs them all.
Such a tensor has no memory. Whatever the model does with it between two blocks, other than hand it on, computes it
first: the region is cut there, and the numbers stay right. Region can lie within region, which is what optimal plans
for a memory budget need.

What techniques do to a block by its interceptor lies outside of the regions, and is done once. It cuts a region of
several blocks, but for a block that is skipped. Under ``torch.compile`` of the whole model each block is a region of
its own; of several blocks that are compiled one by one, regions are those that were asked for.

What is kept of a region: its tensors among the inputs, and the state of torch's random numbers. Numbers that a model
draws between two blocks of a region (LayerDrop of some Hugging Face models) come before those inside, so that bits
differ from a run without it.

Source: Chen, Xu, Zhang, Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016,
https://arxiv.org/abs/1604.06174, section 4.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import checkpoint as torch_checkpoint
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from eke import compat
from eke.seams import interceptor
from eke.seams.wrap import Wrapper, layers_of
from eke.spec import EkeError

Policy = Callable[..., Any] | Sequence[Any]

# Switches of models that recompute by themselves: Hugging Face's, timm's.
_SWITCHES = ("gradient_checkpointing", "grad_checkpointing")


class RecomputeError(EkeError, RuntimeError, ValueError):
    """Blocks cannot be recomputed so, or what lies inside a region was asked for."""


@dataclass(frozen=True)
class Region:
    """Blocks ``start`` to ``stop - 1`` of a list, of which only the first one's input is kept.

    Args:
        start: First block.
        stop: The block after the last one.
        inner: Regions within, in order: when this one is recomputed, they keep only their inputs in turn.

    Raises:
        RecomputeError: no block in it, or inner regions that overlap or stick out.
    """

    start: int
    stop: int
    inner: tuple[Region, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise RecomputeError(f"A region from block {self.start} to before {self.stop} holds none.")
        _check_order(self.inner, self.start, self.stop)

    def __len__(self) -> int:
        return self.stop - self.start


def spans(count: int, length: int = 1, every: int = 1) -> list[Region]:
    """Regions of ``length`` blocks each, one in ``every`` of them, of ``count`` blocks in all.

    With L blocks, of which each keeps A bytes beside an input of x bytes, a step holds about
    ``L / length * x + length * A`` for ``every=1``; the last region is shorter where the length does not divide L.

    Raises:
        RecomputeError: a length or ``every`` below 1.
    """
    for name, value in (("length", length), ("every", every)):
        if value < 1:
            raise RecomputeError(f"{name}={value}: 1 or more is needed.")
    starts = range(0, count, length)[::every]
    return [Region(start, min(start + length, count)) for start in starts]


def recompute(
    blocks: Sequence[nn.Module],
    regions: Sequence[Region] | None = None,
    *,
    owner: str = "recompute",
    policy: Policy | None = None,
    model: nn.Module | None = None,
    own: Literal["take over", "leave"] = "take over",
) -> Recomputing:
    """Let backward recompute blocks, until :meth:`Recomputing.undo`. Values and gradients keep their bits.

    Args:
        blocks: One list of blocks, in the order in which they run.
        regions: What is recomputed as one, in order and without overlap. By default each block for itself.
        owner: Name of the technique.
        policy: What is kept all the same: operators (``[torch.ops.aten.mm.default]``), or
            ``policy(context, operator, *args, **kwargs)`` that returns a ``torch.utils.checkpoint.CheckpointPolicy``.
            One that counts has a ``begin()`` that returns such a function for each region. For regions without inner
            ones.
        model: What holds the blocks. Looked through for recomputing of its own, which would be done twice.
        own: ``"take over"`` switches that off until it is undone; ``"leave"`` leaves such blocks to it, see
            :attr:`Recomputing.left`.

    Raises:
        RecomputeError: regions that overlap or name blocks that are not there; blocks that are recomputed already, by
            another technique or by torch's wrapper.
    """
    blocks = list(blocks)
    regions = spans(len(blocks)) if regions is None else list(regions)
    _check_order(regions, 0, len(blocks))
    for number, block in enumerate(blocks):
        if by := _recomputed_by(block):
            raise RecomputeError(
                f"Block {number}, a {type(block).__name__}, is recomputed already, by {by}. Leave one of the two out."
            )
    done = Recomputing(owner)
    switches = _own_switches(blocks, model)
    if own == "leave" and switches:
        done.left = [name for _, name in switches]
        return done
    for module, name in switches:
        setattr(module, name, False)
        done.taken_over.append((module, name))
    for region in regions:
        inside = blocks[region.start : region.stop]
        if len(region) == 1:
            done.wrappers.append(Wrapper(inside[0], "forward", [_Alone(inside[0], owner, policy)]))
            continue
        interceptor.attach(inside, owner)
        for index, block in enumerate(inside, region.start):
            interceptor.put(block, owner, _Enter(block), _Join(block, index, region, policy, done.cuts))
        done.joined += inside
    return done


class Recomputing:
    """What :func:`recompute` has changed.

    Attributes:
        taken_over: Modules that recomputed by themselves, each with the name of its switch.
        left: Switches of a model that was left to recompute by itself; nothing was changed then.
        cuts: Blocks, by number, before whose end a region of several was cut, because the model or a technique
            looked at hidden states between two blocks, or blocks return more than hidden states.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.wrappers: list[Wrapper] = []
        self.joined: list[nn.Module] = []
        self.taken_over: list[tuple[nn.Module, str]] = []
        self.left: list[str] = []
        self.cuts: set[int] = set()

    def undo(self) -> None:
        """Leave the blocks as they were. Twice is once."""
        for wrapper in reversed(self.wrappers):
            wrapper.remove()
        interceptor.detach(self.joined, self.owner)
        for module, name in self.taken_over:
            setattr(module, name, True)
        self.wrappers, self.joined, self.taken_over = [], [], []


def recomputing() -> bool:
    """Whether what runs now runs a second time, in backward. For what must count or draw once."""
    return compat.in_backward()


# ---------------------------------------------------------------------- one block


class _Alone:
    """Around the ``forward`` of one block."""

    def __init__(self, block: nn.Module, owner: str, policy: Policy | None) -> None:
        self.block, self.owner, self.policy = block, owner, policy

    def __call__(self, call_next: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return _checkpointed(partial(call_next, **kwargs), args, self.policy)
        if not torch.is_grad_enabled() or _in_a_region():
            return call_next(*args, **kwargs)
        args, kwargs = _without_caches(self.block, *_all_real(args, kwargs))
        leaves, spec = tree_flatten((args, kwargs))  # so that all tensors among them are inputs, by name or not

        def run(*leaves: Any) -> Any:
            args, kwargs = tree_unflatten(leaves, spec)
            with _statistics_once(self.block):
                return call_next(*args, **kwargs)

        return _checkpointed(run, leaves, self.policy)


# ---------------------------------------------------------------------- several blocks


class _Enter:
    """On each block of a region of several: outermost of its actions. Other techniques' get hidden states that are
    computed, but for one that skips the block."""

    priority = -1000

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self, call_next: Any, hidden: Tensor, args: Any, kwargs: Any, form: interceptor.Form) -> Any:
        if isinstance(hidden, Later):
            ours = (_Enter, _Join, interceptor.Skip)
            if not all(isinstance(action, ours) for action in interceptor.actions(self.block)):
                hidden = hidden.real()
        return call_next(hidden, args, kwargs)


class _Join:
    """On each block of a region of several: innermost of its actions."""

    priority = 1000

    def __init__(self, block: nn.Module, index: int, region: Region, policy: Policy | None, cuts: set[int]) -> None:
        self.block, self.index, self.region, self.policy, self.cuts = block, index, region, policy, cuts

    def __call__(self, call_next: Any, hidden: Tensor, args: Any, kwargs: Any, form: interceptor.Form) -> Any:
        if torch.compiler.is_compiling():
            return _checkpointed(partial(call_next, args=args, kwargs=kwargs), (hidden,), self.policy)
        args, kwargs = _all_real(args, kwargs)
        if not torch.is_grad_enabled() or _in_a_region():
            return call_next(_real(hidden), args, kwargs)
        args, kwargs = _without_caches(self.block, args, kwargs)
        if isinstance(hidden, Later):
            last = hidden.step
            if last is None or last.join.region is not self.region or last.join.index >= self.index:
                hidden = hidden.real()
        later = Later(hidden, _Step(self, call_next, args, kwargs))
        if self.index == self.region.stop - 1:
            return later.compute()
        if not form.knows(args, kwargs):
            if form.length is not None:
                self.cuts.add(self.index)
            return later.compute()
        return form.wrap(later, args, kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "policy": None}  # a function that need not pickle: a copy recomputes all


class _Step:
    """One block's call that is to come."""

    def __init__(self, join: _Join, call_next: Any, args: Any, kwargs: Any) -> None:
        self.join, self.call_next, self.args, self.kwargs = join, call_next, args, kwargs
        self.autocast = _autocast()

    def run(self, hidden: Tensor, args: Any, kwargs: Any) -> Any:
        with ExitStack() as stack:
            for kind, on, dtype in set(self.autocast) - set(_autocast()):
                stack.enter_context(torch.autocast(kind, dtype, on))
            stack.enter_context(_statistics_once(self.join.block))
            return self.call_next(hidden, args, kwargs)


class Later(Tensor):
    """Hidden states between two blocks of a region: computed when somebody looks at them.

    Attributes:
        step: The last of the calls that lead to it, None once it is computed or passed by.
    """

    @staticmethod
    def __new__(cls, hidden: Tensor, step: _Step) -> Later:
        return compat.memoryless(cls)

    def __init__(self, hidden: Tensor, step: _Step) -> None:
        self.before: Tensor | None = hidden
        self.step: _Step | None = step
        self.value: Tensor | None = None
        compat.refuse_gradient(self, partial(_refuse, "A custom autograd function took"))

    def real(self) -> Tensor:
        """The hidden states, computed here if they are not yet: the region is cut."""
        if self.value is None:
            if self.step is None:
                _refuse("The model looked, after a later block had run, at")
            self.step.join.cuts.add(self.step.join.index)
            self.compute()
        return self.value

    def compute(self) -> Any:
        """Run all calls that lead here, as one region, and return what the last one returns."""
        passed: list[Later] = []
        at: Any = self
        while isinstance(at, Later) and at.value is None:
            if at.step is None:
                _refuse("The model looked, after a later block had run, at")
            passed.append(at)
            at = at.before
        steps = [one.step for one in reversed(passed)]
        hidden = at.value if isinstance(at, Later) else at
        with torch.enable_grad():  # somebody may look at it without gradients
            output = _in_order(hidden, steps, (self.step.join.region,))
        for one in passed:
            one.before = one.step = None
        self.value = _hidden(output)
        return output

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*tree_map(_real, args), **tree_map(_real, kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _refuse(f"{func} read")


def _in_order(hidden: Tensor, steps: list[_Step], regions: Sequence[Region]) -> Any:
    """Run calls, those that lie in a region as a region. Returns what the last one returns."""
    output, at = None, 0
    while at < len(steps):
        index, end = steps[at].join.index, at + 1
        region = next((one for one in regions if one.start <= index < one.stop), None)
        if region is None:
            output = steps[at].run(hidden, steps[at].args, steps[at].kwargs)
        else:
            while end < len(steps) and steps[end].join.index < region.stop:
                end += 1
            output = _as_region(hidden, steps[at:end], region.inner)
        hidden, at = _hidden(output), end
    return output


def _as_region(hidden: Tensor, steps: list[_Step], inner: Sequence[Region]) -> Any:
    leaves, spec = tree_flatten([(step.args, step.kwargs) for step in steps])

    def run(hidden: Tensor, *leaves: Any) -> Any:
        given = tree_unflatten(leaves, spec)
        again = [_Step(step.join, step.call_next, *own) for step, own in zip(steps, given, strict=True)]
        for step, before in zip(again, steps, strict=True):
            step.autocast = before.autocast
        return _in_order(hidden, again, inner)

    return _checkpointed(run, (hidden, *leaves), None if inner else steps[0].join.policy)


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _real(value: Any) -> Any:
    return value.real() if isinstance(value, Later) else value


def _all_real(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return tuple(map(_real, args)), {name: _real(value) for name, value in kwargs.items()}


def _refuse(who: str, *_: Any) -> Any:
    raise RecomputeError(
        f"{who} hidden states between two blocks that are recomputed as one, and these are not kept. Give regions of "
        "one block each."
    )


# ---------------------------------------------------------------------- parts


def _checkpointed(function: Callable[..., Any], args: Sequence[Any], policy: Policy | None) -> Any:
    select = {}
    if policy is not None:
        policy = policy.begin() if hasattr(policy, "begin") else policy
        select["context_fn"] = partial(torch_checkpoint.create_selective_checkpoint_contexts, policy)
    return torch_checkpoint.checkpoint(function, *args, use_reentrant=False, **select)


def _in_a_region() -> bool:
    """Whether somebody else is recomputing what is being called: a model that calls checkpoint() in its forward."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename == torch_checkpoint.__file__:
            return True
        frame = frame.f_back
    return False


@contextmanager
def _statistics_once(block: nn.Module) -> Iterator[None]:
    """Let batch norms not move their statistics a second time. What they compute in training does not depend on it."""
    again = block.modules() if recomputing() else ()
    norms = [one for one in again if one.training and getattr(one, "track_running_stats", False)]
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, batches in before:
            norm.momentum, norm.num_batches_tracked = momentum, batches


def _without_caches(block: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Leave out a cache of keys and values, which recomputing would fill twice."""
    named = [*enumerate(args), *kwargs.items()]
    caches = [name for name, value in named if "Cache" in type(value).__name__]
    if not caches:
        return args, kwargs
    warnings.warn(
        f"{type(block).__name__} gets a cache of keys and values, which recomputing would fill twice. It is left out; "
        "model.config.use_cache = False makes none.",
        stacklevel=2,
    )
    args = tuple(None if number in caches else value for number, value in enumerate(args))
    kwargs = {name: None if name in caches else value for name, value in kwargs.items()}
    return args, ({**kwargs, "use_cache": False} if kwargs.get("use_cache") else kwargs)


def _autocast() -> list[tuple[str, bool, torch.dtype]]:
    kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]


def _own_switches(blocks: Sequence[nn.Module], model: nn.Module | None) -> list[tuple[nn.Module, str]]:
    """Modules that recompute these blocks by themselves: they, or what holds them."""
    mine = {id(block) for block in blocks}
    around = [] if model is None else [one for one in model.modules() if any(id(sub) in mine for sub in one.modules())]
    found = {id(one): one for one in (*around, *blocks)}.values()
    return [(one, name) for one in found for name in _SWITCHES if getattr(one, name, False) is True]


def _recomputed_by(block: nn.Module) -> str:
    layers = [*layers_of(block, "forward"), *interceptor.actions(block)]
    for layer in layers:
        if isinstance(layer, _Alone):
            return layer.owner
        if isinstance(layer, _Join):
            return "regions of several blocks"
    return "torch's checkpoint_wrapper" if compat.is_checkpoint_wrapped(block) else ""


def _check_order(regions: Sequence[Region], start: int, stop: int) -> None:
    for region in regions:
        if region.start < start or region.stop > stop:
            raise RecomputeError(
                f"The region from block {region.start} to before {region.stop} overlaps the one before it, or goes "
                f"beyond the {stop} blocks that there are. Give them in order."
            )
        start = region.stop
