"""Skip a block, run it on some tokens, or change its tokens: one interceptor per block, shared by all techniques.

The tricks it hides: a wrapper module would put its name into every key of the state dict, and a replaced ``forward``
makes a deep copy run the original's weights. So the class of the block is exchanged for a subclass of itself: keys,
``isinstance``, deep copies, pickles and activation checkpointing stay as they were. The subclass acts in
``__call__``, outside a ``forward`` that somebody else has wrapped, outside the block's hooks, and outside the
block's own compiled code (``block.compile()``), which then needs no other graph when the actions change.

A model compiled as a whole has one graph for each set of actions, and one that its first call leaves behind.
"""

from __future__ import annotations

import copyreg
import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from eke.seams import blocks
from eke.spec import EkeError

_STATE = "_eke_interceptor"


class InterceptorError(EkeError, RuntimeError):
    """A block gets or returns what cannot be skipped, cut or put back."""


class Action(Protocol):
    """What a technique does to a block. It must not be a closure: a deep copy of the model copies it too."""

    priority: int  # lower ones act first, outside the others

    def __call__(
        self, call_next: Callable[..., Any], hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], form: Form
    ) -> Any:
        """Return what the block would: ``call_next(hidden, args, kwargs)``, or ``form.wrap(hidden)`` without it."""


class Form:
    """How the blocks of one list return hidden states: a tensor, or a tuple that begins with it.

    Learned each time one of them runs.
    """

    def __init__(self) -> None:
        self.length: int | None = None  # of the tuple; 0 for a tensor, None before a block has run
        self.carries = ""  # classes of what else the tuple holds

    def learn(self, output: Any) -> None:
        length = len(output) if isinstance(output, tuple) else 0
        if not isinstance(output[0] if length else output, Tensor):
            length = -1
        carries = ", ".join(type(item).__name__ for item in output[1:] if item is not None) if length > 0 else ""
        # Written only when it changes: each write would cost a compiled model a graph.
        if length != self.length:
            self.length = length
        if carries != self.carries:
            self.carries = carries

    def wrap(self, hidden: Tensor) -> Any:
        """``hidden`` in the form of a block's output.

        Raises:
            InterceptorError: no block of the list has run yet, or the tuple carries more than hidden states.
        """
        if self.length is None:
            raise InterceptorError(
                "A block was to be skipped before any block of its list had run, so the form of its output is not "
                "known. Keep the first block open."
            )
        self.check()
        return hidden if self.length == 0 else (hidden, *[None] * (self.length - 1))

    def check(self) -> None:
        """Refuse to make up an output that holds more than hidden states."""
        if self.length == -1:
            raise InterceptorError(
                "The blocks return neither a tensor nor a tuple that begins with one: they cannot be intercepted."
            )
        if self.carries:
            raise InterceptorError(
                f"The blocks return ({', '.join(('Tensor', self.carries))}): a skipped block has no cache and no "
                "attention maps to return. Switch those off (use_cache=False, output_attentions=False)."
            )


class Skip:
    """The block is skipped: it passes its input on."""

    priority = 0

    def __call__(self, call_next: Any, hidden: Tensor, args: Any, kwargs: Any, form: Form) -> Any:
        return form.wrap(hidden)


class Edit:
    """Change the tokens before the block, after it, or both.

    Args:
        before: Hidden states to what the block gets, such as a ``partial`` of :func:`insert_tokens`.
        after: The block's hidden states to what the model gets.
    """

    priority = 1

    def __init__(
        self, before: Callable[[Tensor], Tensor] | None = None, after: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.before = before
        self.after = after

    def __call__(self, call_next: Any, hidden: Tensor, args: Any, kwargs: Any, form: Form) -> Any:
        output = call_next(hidden if self.before is None else self.before(hidden), args, kwargs)
        if self.after is None:
            return output
        return (self.after(output[0]), *output[1:]) if isinstance(output, tuple) else self.after(output)


class Select:
    """Run the block on some tokens; the others pass it by.

    Args:
        select: Hidden states to the positions that take part: int64, rising, (batch, k) or, the same for the whole
            batch, (k,). None runs all of them. With activation checkpointing it is called once, outside.
        side: ``side(args, kwargs, positions)`` cuts the block's other inputs to these tokens and returns both. Without
            it, an input that has a dimension as long as the sequence is refused.
        dim: Dimension of the tokens: 1 for (batch, length, width), 0 for (length, batch, width) with (k,) positions.
    """

    priority = 2

    def __init__(
        self,
        select: Callable[[Tensor], Tensor | None],
        side: Callable[[tuple[Any, ...], dict[str, Any], Tensor], tuple[tuple[Any, ...], dict[str, Any]]] | None = None,
        dim: int = 1,
    ) -> None:
        self.select = select
        self.side = side
        self.dim = dim

    def __call__(self, call_next: Any, hidden: Tensor, args: Any, kwargs: Any, form: Form) -> Any:
        positions = self.select(hidden)
        if positions is None:
            return call_next(hidden, args, kwargs)
        if hidden.is_nested:
            raise InterceptorError(
                "Tokens of a nested tensor cannot be chosen. "
                "Build nn.TransformerEncoder with enable_nested_tensor=False."
            )
        given = [*args, *kwargs.values()]
        if self.side is not None:
            args, kwargs = self.side(args, kwargs, positions)
        else:
            _refuse_side_inputs(hidden.shape[self.dim], args, kwargs)
        output = call_next(gather_tokens(hidden, positions, self.dim), args, kwargs)
        if not isinstance(output, tuple):
            return scatter_tokens(hidden, output, positions, self.dim)
        # What the block hands on as it got it, such as T5's position bias, the next one gets whole again.
        whole = {id(cut): one for cut, one in zip((*args, *kwargs.values()), given, strict=True)}
        others = [whole.get(id(item), item) for item in output[1:]]
        if any(item is not None and id(item) not in whole for item in output[1:]):
            form.check()
        return (scatter_tokens(hidden, output[0], positions, self.dim), *others)


def gather_tokens(hidden: Tensor, positions: Tensor, dim: int = 1) -> Tensor:
    """The tokens at ``positions``, (batch, k) or (k,), of ``hidden``, (batch, length, width)."""
    if positions.ndim == 1:
        return hidden.index_select(dim, positions)
    return hidden.gather(1, positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


def scatter_tokens(hidden: Tensor, tokens: Tensor, positions: Tensor, dim: int = 1) -> Tensor:
    """``hidden`` with ``tokens``, (batch, k, width), at ``positions``. Undoes :func:`gather_tokens`."""
    tokens = tokens.to(hidden.dtype)
    if positions.ndim == 1:
        return hidden.index_copy(dim, positions, tokens)
    return hidden.scatter(1, positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]), tokens)


def insert_tokens(hidden: Tensor, tokens: Tensor, at: int = 0) -> Tensor:
    """``hidden``, (batch, length, width), with ``tokens``, (n, width) or (batch, n, width), put in before ``at``."""
    tokens = tokens.expand(hidden.shape[0], -1, -1).to(hidden.dtype)
    return torch.cat([hidden[:, :at], tokens, hidden[:, at:]], dim=1)


def replace_tokens(hidden: Tensor, tokens: Tensor, at: int = 0) -> Tensor:
    """``hidden`` with ``tokens`` in place of as many from ``at`` on."""
    tokens = tokens.expand(hidden.shape[0], -1, -1).to(hidden.dtype)
    return torch.cat([hidden[:, :at], tokens, hidden[:, at + tokens.shape[1] :]], dim=1)


def attach(blocks: Iterable[nn.Module], owner: str) -> None:
    """Put an interceptor without actions on each block, or join the one that is there. Twice is once.

    Args:
        blocks: Blocks of one list: what one of them returns tells the form of what the others would.
        owner: Name of the technique.
    """
    blocks = list(blocks)
    form = next((vars(block)[_STATE].form for block in blocks if _STATE in vars(block)), None) or Form()
    for block in blocks:
        if not isinstance(block, InterceptedBlock):
            vars(block)[_STATE] = Interceptor(form, _hidden_name(block))
            block.__class__ = _intercepted(type(block))
        vars(block)[_STATE].owners.setdefault(owner, ())


def put(block: nn.Module, owner: str, *actions: Action) -> None:
    """Set what ``owner`` does to the block, in place of what it did before. Without actions the block is as it was.

    Raises:
        KeyError: ``owner`` has not attached itself to the block.
    """
    interceptor = vars(block).get(_STATE)
    if interceptor is None or owner not in interceptor.owners:
        raise KeyError(f"{owner!r} has no interceptor on this {type(block).__name__}. Call attach first.")
    interceptor.owners[owner] = actions
    all_of_them = [action for own in interceptor.owners.values() for action in own]
    interceptor.actions = tuple(sorted(all_of_them, key=lambda action: action.priority))


def actions(block: nn.Module, owner: str | None = None) -> tuple[Action, ...]:
    """What acts on the block, in order: all of it, or what ``owner`` put there."""
    interceptor = vars(block).get(_STATE)
    if interceptor is None:
        return ()
    return interceptor.actions if owner is None else interceptor.owners.get(owner, ())


def detach(blocks: Sequence[nn.Module], owner: str) -> None:
    """Take ``owner`` off. With the last owner gone, a block has its own class again. Twice is once."""
    for block in blocks:
        interceptor = vars(block).get(_STATE)
        if interceptor is None or owner not in interceptor.owners:
            continue
        put(block, owner)
        del interceptor.owners[owner]
        # Where somebody has put a class of his own on top (FSDP2 does), an interceptor without owners stays.
        if not interceptor.owners and "eke_plain" in vars(type(block)):
            block.__class__ = type(block).eke_plain
            del vars(block)[_STATE]


class Interceptor:
    """What one block carries: who acts on it, and how its list returns hidden states."""

    def __init__(self, form: Form, hidden_name: str) -> None:
        self.form = form
        self.hidden_name = hidden_name
        self.owners: dict[str, tuple[Action, ...]] = {}
        self.actions: tuple[Action, ...] = ()

    def run(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.actions:
            output = call(*args, **kwargs)
            self.form.learn(output)
            return output
        if args:
            return self._run(self.actions, call, args[0], args[1:], kwargs)
        others = {name: value for name, value in kwargs.items() if name != self.hidden_name}
        return self._run(self.actions, partial(self._by_name, call), kwargs[self.hidden_name], (), others)

    # The actions are those of the call: who computes the block again in backward meets those of its forward, whatever
    # has been put or taken off since.
    def _run(
        self, actions: tuple[Action, ...], call: Callable[..., Any], hidden: Tensor, args: Any, kwargs: Any
    ) -> Any:
        if not actions:
            output = call(hidden, *args, **kwargs)
            self.form.learn(output)
            return output
        return actions[0](partial(self._run, actions[1:], call), hidden, args, kwargs, self.form)

    def _by_name(self, call: Callable[..., Any], hidden: Tensor, **kwargs: Any) -> Any:
        return call(**{self.hidden_name: hidden}, **kwargs)


# Block and what each technique does to it.
Actions = list[tuple[nn.Module, dict[str, tuple[Action, ...]]]]


def actions_in(module: nn.Module) -> Actions:
    """What is done to the blocks of a model at the moment, for :func:`set_actions`."""
    return [(block, dict(vars(block)[_STATE].owners)) for block in module.modules() if _STATE in vars(block)]


def set_actions(actions: Actions) -> None:
    """Put back what :func:`actions_in` gave."""
    for block, owners in actions:
        for owner, own in owners.items():
            put(block, owner, *own)


class InterceptedBlocks:
    """The blocks of a list on which a technique may act: those that it holds at the moment, also after growth.

    Args:
        owner: Name of the technique.
        found: The list.
        part: Which of its blocks.
    """

    def __init__(self, owner: str, found: blocks.Blocks, part: slice = slice(None)) -> None:
        self.owner, self.found, self.part = owner, found, part
        self._held: list[nn.Module] = []

    def now(self) -> list[nn.Module]:
        """The blocks of the moment, each with an interceptor. Those that have left the list have none of ours."""
        now = list(self.found.container)[self.part]
        if len(now) != len(self._held) or any(new is not old for new, old in zip(now, self._held, strict=True)):
            detach([old for old in self._held if not any(old is new for new in now)], self.owner)
            attach(now, self.owner)
            self._held = now
        return now

    def __len__(self) -> int:
        """How many they were when last asked for."""
        return len(self._held)

    def put(self, block: nn.Module, *actions: Action) -> None:
        """Set what is done to one of them."""
        put(block, self.owner, *actions)

    def clear(self) -> None:
        """Leave all of them as they are."""
        for block in self._held:
            put(block, self.owner)

    def detach(self) -> None:
        """Take the interceptors off."""
        detach(self._held, self.owner)
        self._held = []

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _nothing, ()  # a copy of a technique begins without a model


def _nothing() -> None:
    return None


class InterceptedBlock:
    """Mixed into the class of a block, on that one instance."""

    eke_plain: ClassVar[type[nn.Module]]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return vars(self)[_STATE].run(super().__call__, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was made here and cannot be imported by name: pickle makes it again from the plain one.
        make, args, *rest = super().__reduce_ex__(max(int(protocol), 2))
        if make is copyreg.__newobj__ and "eke_plain" in vars(args[0]):
            return (_new, (args[0].eke_plain, *args[1:]), *rest)
        return (make, args, *rest)


@cache
def _intercepted(plain: type[nn.Module]) -> type[nn.Module]:
    # Under the plain class's name: wrapping policies and printouts go by it.
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    return type(plain.__name__, (InterceptedBlock, plain), {**names, "eke_plain": plain})


def _new(plain: type[nn.Module], *args: Any) -> nn.Module:
    intercepted = _intercepted(plain)
    return intercepted.__new__(intercepted, *args)


def _hidden_name(block: nn.Module) -> str:
    return next(iter(inspect.signature(block.forward).parameters), "")


def _refuse_side_inputs(length: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    named = [*((f"argument {i}", value) for i, value in enumerate(args, 1)), *kwargs.items()]
    for name, value in named:
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, Tensor) and length in item.shape:
                raise InterceptorError(
                    f"The block also gets {name} of shape {tuple(item.shape)}, one entry a token, which would have "
                    "to be cut to the tokens that take part. This technique does not know how: leave it out here."
                )
