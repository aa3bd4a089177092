"""A second forward and backward over the batches of an accumulation window, for two-pass methods such as SAM.

The tricks it hides: an optimizer that calls Lightning's closure twice breaks accumulation and the gradient scaler and
logs the wrong loss; the other techniques would draw, count and choose again; dropout would draw other masks; running
statistics, metrics and what a step notes for itself would move twice; DDP must reduce only on a window's last pass;
gradients lie unscaled between backward and the optimizer's step, and a second backward under the scaler has to be
unscaled by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from eke import compat
from eke.seams import interceptor
from eke.seams.state import rng_state, set_rng_state
from eke.seams.step import loss_of, muted, no_sync, notes_kept
from eke.spec import ConflictError


@dataclass
class _Seen:
    """One batch of the window, and all that its first pass began with."""

    args: tuple[Any, ...]
    random: dict[str, Any]
    generators: list[torch.Tensor]
    actions: interceptor.Actions
    memo: dict[Hashable, Any] = field(default_factory=dict)


class Passes:
    """The window at hand.

    Args:
        trainer, module: Of the run.
        generators: The techniques' own.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, generators: list[torch.Generator]) -> None:
        self.trainer, self.module, self.generators = trainer, module, generators
        self.window: list[_Seen] = []
        self.repeating = False
        self.optimizer: Optimizer | None = None  # about to step
        self._now: _Seen | None = None
        self._incomplete = False  # the window began before a checkpoint that does not hold all of it

    def begin_window(self) -> None:
        self.window, self._incomplete = [], False

    def around(self, call_next: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The outermost layer of ``training_step``."""
        if not self.repeating:
            states = [one.get_state() for one in self.generators]
            self._now = _Seen(args, rng_state(), states, interceptor.actions_in(self.module))
            self.window.append(self._now)
        return call_next(*args, **kwargs)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """``make()`` in the first pass over the batch at hand, and its value in the second."""
        if self._now is None:
            return make()
        if key not in self._now.memo:
            self._now.memo[key] = make()
        return self._now.memo[key]

    def second(self) -> None:
        """Put the gradients of a second pass over the window in place of those that are there."""
        if self._incomplete:
            raise ConflictError(
                "The run resumed within an accumulation window, whose first batches a second pass would need and the "
                "checkpoint could not hold. Resume from one that was written at a window's end."
            )
        after = rng_state(), [one.get_state() for one in self.generators], interceptor.actions_in(self.module)
        buffers = [(one, one.detach().clone()) for one in self.module.buffers()]
        for parameter in self.module.parameters():
            parameter.grad = None
        self.repeating = True
        try:
            for seen in self.window:
                self._begin(seen.random, seen.generators, seen.actions)
                self._now = seen
                self._pass(seen, last=seen is self.window[-1])
            compat.unscale_again(self.trainer, self.optimizer, self.module)
        finally:
            self.repeating = False
            self._begin(*after)
            with torch.no_grad():
                for buffer, value in buffers:  # running statistics move once a step
                    buffer.copy_(value)

    def _pass(self, seen: _Seen, last: bool) -> None:
        trainer = self.trainer
        with muted(self.module), notes_kept(self.module), nullcontext() if last else no_sync(trainer):
            loss = loss_of(trainer.strategy.training_step(*seen.args)) / trainer.accumulate_grad_batches
            trainer.precision_plugin.backward(loss * compat.loss_scale(trainer), self.module, self.optimizer)

    def _begin(self, random: dict[str, Any], generators: list[torch.Tensor], actions: interceptor.Actions) -> None:
        set_rng_state(random)
        for generator, state in zip(self.generators, generators, strict=True):
            generator.set_state(state)
        interceptor.set_actions(actions)

    # ------------------------------------------------------------------ a window that a checkpoint cuts in two

    def state_dict(self) -> dict[str, Any]:
        """The window as far as it has come. Batches and values that a safe load would not read back are left out, and
        so are windows in which blocks were acted on: the resumed run then refuses its next second pass."""
        plain = all(not _acts(seen) and _plain(seen.args) and _plain(seen.memo) for seen in self.window)
        parts = [
            {"args": one.args, "random": one.random, "generators": one.generators, "memo": list(one.memo.items())}
            for one in self.window
        ]
        return {"complete": plain and not self._incomplete, "window": parts if plain else []}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._incomplete = not state["complete"]
        move = self.trainer.strategy.batch_to_device
        self.window = [
            _Seen(tuple(move(one) for one in part["args"]), part["random"], part["generators"], [], dict(part["memo"]))
            for part in state["window"]
        ]


def _acts(seen: _Seen) -> bool:
    return any(own for _, owners in seen.actions for own in owners.values())


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_plain(key) and _plain(item) for key, item in value.items())
    if type(value) in (list, tuple):
        return all(map(_plain, value))
    return value is None or type(value) in (bool, int, float, str, bytes) or type(value) is torch.Tensor
