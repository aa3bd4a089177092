"""What a strategy imposes on techniques, and which of them cannot bear it.

One rule for ``eke check``, ``eke.trainer_kwargs`` and ``Trainer.fit``: a strategy imposes words of
:data:`eke.spec.IMPOSITIONS`, and a technique that touches what such a word concerns has to tolerate it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)

from eke import compat
from eke.spec import IMPOSITIONS, ConflictError, Technique

_SHARDED = ("sharded optimizer", "sharded gradients", "sharded parameters")  # one more with each stage of ZeRO


class StrategyError(ConflictError, MisconfigurationException):
    """A technique cannot bear what the Trainer's strategy does."""


def imposed(strategy: object) -> tuple[str, ...]:
    """What techniques have to bear under a strategy: by its record, or by Lightning's class.

    A strategy that is neither may do anything, so it imposes all there is.
    """
    if (record := _record(strategy)) is not None:
        return record.imposed(arguments_of(strategy))
    if isinstance(strategy, DeepSpeedStrategy):  # before DDPStrategy, which it inherits
        stage = (strategy.config or {}).get("zero_optimization", {}).get("stage", 0)
        return (*_SHARDED[:stage], "own optimizer")
    if isinstance(strategy, FSDPStrategy):
        return (*_SHARDED, "gathered states", "awaited blocks")
    if isinstance(strategy, ModelParallelStrategy):
        return _SHARDED if compat.saves_sharded(strategy) else (*_SHARDED, "gathered states")
    if isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        return ()
    return tuple(IMPOSITIONS)


def refusals(techniques: Iterable[object], strategy: object) -> list[str]:
    """Name each technique that cannot bear a strategy, a sentence each with the reason; empty where all can."""
    words = imposed(strategy)
    found = []
    for technique in techniques:
        record = _record(technique)
        if record is None or technique is strategy:
            continue
        tolerated = record.tolerated(arguments_of(technique))
        for word in words:
            definition, resources = IMPOSITIONS[word]
            touched = [effect for effect in record.effects if effect.partition(" ")[2] in resources]
            if touched and word not in tolerated:
                found.append(
                    f"{record.name!r} {_listed(touched)}, and {_name(strategy)} imposes {word!r}: {definition}. "
                    f"{record.intolerance or _INSTEAD}"
                )
                break  # one reason is enough
    return found


def check(techniques: Iterable[object], strategy: object) -> None:
    """Refuse techniques that cannot bear a strategy.

    Raises:
        StrategyError: with the words of :func:`refusals`.
    """
    if found := refusals(techniques, strategy):
        raise StrategyError(" ".join(found))


def arguments_of(built: object) -> dict[str, Any]:
    """The arguments that an object was built with, by their names: what it keeps under that name, else the default."""
    found = {}
    for name, parameter in inspect.signature(type(built).__init__).parameters.items():
        if hasattr(built, name):
            found[name] = getattr(built, name)
        elif parameter.default is not parameter.empty:
            found[name] = parameter.default
    return found


_INSTEAD = "It does not say that it bears that. Use one device or strategy='ddp', or leave one of them out."


def _record(built: object) -> Technique | None:
    record = getattr(type(built), "technique", None)
    return record if isinstance(record, Technique) else None


def _name(strategy: object) -> str:
    record = _record(strategy)
    return repr(record.name) if record is not None else type(strategy).__name__


def _listed(effects: list[str]) -> str:
    """``["changes weights", "reads loss"]`` as ``changes weights and reads loss``."""
    return " and ".join([", ".join(effects[:-1]), effects[-1]] if len(effects) > 1 else effects)
