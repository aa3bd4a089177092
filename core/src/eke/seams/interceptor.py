"""Skip a block, run it on some tokens, or change its tokens: one interceptor per block, shared by all techniques.

The tricks it hides: a wrapper module would put its name into every key of the state dict, and a replaced ``forward``
makes a deep copy run the original's weights. So the class of the block is exchanged for a subclass of itself: keys,
``isinstance``, deep copies, pickles and activation checkpointing stay as they were. The subclass acts in
``__call__``, outside a ``forward`` that somebody else has wrapped, outside the block's hooks, and outside the
block's own compiled code (``block.compile()``), which then needs no other graph when the actions change.

A model compiled as a whole has one graph for each set of actions, and one that its first call leaves behind.
"""

from __future__ import annotations

import contextvars
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

    Learned each time one of them runs. What else the tuple holds a block has got and hands on, as T5's position bias,
    or it has made it.
    """

    def __init__(self) -> None:
        self.length: int | None = None  # of the tuple; 0 for a tensor, None before a block has run
        self.carries = ""  # classes of what the last block has made that is not handed on
        self.handed: dict[int, int | str] = {}  # place in the tuple to the input that is handed on there

    def learn(self, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at what a block has made of its inputs, those beside the hidden states."""
        length = len(output) if isinstance(output, tuple) else 0
        if not isinstance(output[0] if length else output, Tensor):
            length = -1
        extra = [place for place in range(1, length) if output[place] is not None]
        for place in extra:
            key = _key_of(output[place], args, kwargs)
            if key is not None and self.handed.get(place) != key:
                self.handed[place] = key
        carries = ", ".join(type(output[place]).__name__ for place in extra if place not in self.handed)
        # Written only when it changes: each write would cost a compiled model a graph.
        if length != self.length:
            self.length = length
        if carries != self.carries:
            self.carries = carries

    def wrap(self, hidden: Tensor, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """``hidden`` in the form of a block's output, with what the block would hand on of its other inputs.

        Raises:
            InterceptorError: no block of the list has run yet, or blocks make more than hidden states.
        """
        self.check(args, kwargs)
        if self.length == 0:
            return hidden
        return (hidden, *(self._input(place, args, kwargs or {}) for place in range(1, self.length)))

    def check(self, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> None:
        """Refuse to make up an output that holds more than hidden states and what is handed on."""
        if self.length is None:
            raise InterceptorError(
                "A block was to be skipped before any block of its list had run, so the form of its output is not "
                "known. Keep the first block open."
            )
        if self.length == -1:
            raise InterceptorError(
                "The blocks return neither a tensor nor a tuple that begins with one: they cannot be intercepted."
            )
        if kwargs is not None and self.made_here(args, kwargs):
            raise InterceptorError(
                "This block makes what the later ones hand on, such as a position bias: it can be neither skipped nor "
                "run on a part of its tokens. Keep it open."
            )
        if self.carries:
            advice = "use_cache=False" if "Cache" in self.carries else "use_cache=False, output_attentions=False"
            raise InterceptorError(
                f"The blocks return ({', '.join(('Tensor', self.carries))}): a skipped block has no cache, no "
                f"attention maps and no router's logits to return. Switch those off ({advice})."
            )

    def knows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether :meth:`wrap` has all that it needs."""
        return self.length is not None and self.length >= 0 and not self.carries and not self.made_here(args, kwargs)

    def made_here(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the block with these inputs makes what the later ones hand on."""
        return any(self._input(place, args, kwargs) is None for place in self.handed)

    def _input(self, place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = self.handed.get(place)
        if isinstance(key, int):
            return args[key] if key < len(args) else None
        return kwargs.get(key)


def makes(output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a block has returned more than hidden states and what it got."""
    others = output[1:] if isinstance(output, tuple) else ()
    return any(item is not None and _key_of(item, args, kwargs) is None for item in others)


def _key_of(item: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
    """Which of a block's inputs is handed on."""
    for key, value in (*enumerate(args), *kwargs.items()):
        if value is item or _same_memory(value, item):
            return key
    return None


def _same_memory(value: Any, item: Any) -> bool:
    """Reentrant checkpointing returns an alias of what a block hands on."""
    if not isinstance(value, Tensor) or type(value) is not type(item) or torch.compiler.is_compiling():
        return False
    try:
        return value.is_set_to(item)
    except (NotImplementedError, RuntimeError):  # tensors without memory have none in common
        return False


class Skip:
    """The block is skipped: it passes its input on, and what else it would hand on.

    Where no block of the list has shown yet what that is, this one runs once to show it, without gradient.
    """

    priority = 0

    def __call__(self, call_next: Any, hidden: Tensor, args: Any, kwargs: Any, form: Form) -> Any:
        if form.length is None or form.carries:
            show(call_next, hidden, args, kwargs)
        return form.wrap(hidden, args, kwargs)


def show(call_next: Callable[..., Any], hidden: Tensor, args: Any, kwargs: Any) -> None:
    """Run a block for its :class:`Form` alone: without gradient, with random numbers of its own, and in a context of
    its own, in which nobody collects what blocks give, as Hugging Face's models do for a router's loss."""
    cards = [hidden.device.index] if hidden.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(cards):
        if torch.compiler.is_compiling():
            call_next(hidden, args, kwargs)
        else:
            contextvars.Context().run(call_next, hidden, args, kwargs)


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
        whole = dict(zip((*range(len(args)), *kwargs), given, strict=True))
        keys = [None if item is None else _key_of(item, args, kwargs) for item in output[1:]]
        others = [item if key is None else whole[key] for item, key in zip(output[1:], keys, strict=True)]
        if any(item is not None and key is None for item, key in zip(output[1:], keys, strict=True)):
            form.check(args, kwargs)
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
    for block in blocks:
        if isinstance(block, (nn.ModuleList, nn.ModuleDict)):
            raise InterceptorError(
                f"A block is a {type(block).__name__}, whose parts the model calls one by one: nobody calls the block, "
                "so that it cannot be skipped, cut or recomputed. Give each block a class with a forward of its own."
            )
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
            self.form.learn(output, args[1:], kwargs)
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
            self.form.learn(output, args, kwargs)
            return output
        return actions[0](partial(self._run, actions[1:], call), hidden, args, kwargs, self.form)

    def _by_name(self, call: Callable[..., Any], hidden: Tensor, **kwargs: Any) -> Any:
        return call(**{self.hidden_name: hidden}, **kwargs)


# Block and what each technique does to it.
Actions = list[tuple[nn.Module, dict[str, tuple[Action, ...]]]]


def actions_in(module: nn.Module) -> Actions:
    """What is done to the blocks of a model at the moment, for :func:`set_actions`."""
    return [(block, dict(vars(block)[_STATE].owners)) for block in module.modules() if _STATE in vars(block)]


def skips(module: nn.Module) -> bool:
    """Whether a block of a model is skipped at the moment."""
    return any(isinstance(one, Skip) for _, owners in actions_in(module) for own in owners.values() for one in own)


def set_actions(actions: Actions) -> None:
    """Put back what :func:`actions_in` gave."""
    for block, owners in actions:
        for owner, own in owners.items():
            put(block, owner, *own)


class InterceptedBlocks:
    """The blocks on which a technique may act: those that their lists hold at the moment, also after growth.

    Args:
        owner: Name of the technique.
        found: The list, or several: of an encoder and a decoder, of two towers, of stages.
        part: Which blocks of each.
    """

    def __init__(self, owner: str, found: blocks.Blocks | Sequence[blocks.Blocks], part: slice = slice(None)) -> None:
        self.owner, self.part = owner, part
        self.found = [found] if isinstance(found, blocks.Blocks) else list(found)
        self._held: list[list[nn.Module]] = [[] for _ in self.found]

    def now(self) -> list[nn.Module]:
        """The blocks of the moment, each with an interceptor, one list after the other. Those that have left theirs
        have none of ours."""
        return [block for blocks in self.lists() for block in blocks]

    def lists(self) -> list[list[nn.Module]]:
        """As :meth:`now`, by list."""
        for number, found in enumerate(self.found):
            now, held = list(found.container)[self.part], self._held[number]
            if len(now) != len(held) or any(new is not old for new, old in zip(now, held, strict=True)):
                detach([old for old in held if not any(old is new for new in now)], self.owner)
                attach(now, self.owner)
                self._held[number] = now
        return [list(held) for held in self._held]

    def __len__(self) -> int:
        """How many they were when last asked for."""
        return sum(map(len, self._held))

    def put(self, block: nn.Module, *actions: Action) -> None:
        """Set what is done to one of them."""
        put(block, self.owner, *actions)

    def clear(self) -> None:
        """Leave all of them as they are."""
        for held in self._held:
            for block in held:
                put(block, self.owner)

    def detach(self) -> None:
        """Take the interceptors off."""
        for held in self._held:
            detach(held, self.owner)
        self._held = [[] for _ in self.found]

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
