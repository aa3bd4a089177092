"""What a technique tells the core: one hook that returns one record. Imports neither torch nor lightning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

import pluggy

hookspec = pluggy.HookspecMarker("eke")
hookimpl = pluggy.HookimplMarker("eke")

Kind = Literal["callback", "plugin", "strategy"]

KINDS = ("callback", "plugin", "strategy")

# An effect is a verb and a resource, such as "changes weights". Two that replace one resource exclude
# each other; otherwise replacing comes before changing, and changing before reading.
VERBS = ("replaces", "changes", "reads")

# In the order in which a run meets them: where verbs leave the order open, this decides.
RESOURCES = (
    "samples",
    "batch",
    "module tree",
    "attention",
    "precision",
    "requires_grad",
    "weights",
    "activations",
    "sharding",
    "optimizer",
    "optimizer state",
    "loss",
    "gradients",
    "learning rate",
    "weights-at-eval",
)

# What a technique may ask of a run. The coordinator checks each by name before the first step.
NEEDS = ("automatic optimization", "one optimizer", "sized training data")

# From strongest promise to weakest: what a technique does to the numbers of a run.
EXACTNESS = ("exact", "reordered sums", "unbiased", "approximate", "model-changing")


# What saving memory costs, from what a run notices least to what it notices most: the order in which a forecast tries.
COSTS = ("rounding", "communication", "smaller batches", "recomputing", "transfers")


class EkeError(Exception):
    """The core cannot give what was asked of it."""


class ConflictError(EkeError):
    """Techniques that cannot work together were put into one run."""


class NoEffectWarning(UserWarning):
    """A technique was switched on and found nothing to act on."""


@dataclass(frozen=True)
class Offer:
    """A way in which a technique makes a step need less memory.

    Args:
        cost: What it costs, of :data:`COSTS`.
        arguments: With which the technique does it.
        ranks: Fewest processes with which it saves anything.

    Raises:
        ValueError: another cost.
    """

    cost: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    ranks: int = 1

    def __post_init__(self) -> None:
        _one_of("cost", self.cost, COSTS)


@dataclass(frozen=True)
class Technique:
    """One technique, as the registry and the solver know it. Data only.

    Args:
        name: Lower-case words joined by underscores, the entry point's name, such as ``"token_drop"``.
        kind: Folder and family: ``"callback"``, ``"plugin"`` or ``"strategy"``. Which Trainer argument the
            built object goes to follows from its class.
        factory: What builds the Lightning object: a callable, or ``"module:attribute"``, imported when asked for.
        paper: Address of the paper.
        survey: Section and reference in "A Survey on Efficient Training of Transformers".
        effects: What it does to a run, each ``"<verb> <resource>"`` of :data:`VERBS` and :data:`RESOURCES`.
        needs: What it asks of a run, of :data:`NEEDS`.
        conflicts: Technique name to the reason why both cannot run together. For what effects cannot say.
        after: Names of techniques that must act earlier. For what effects cannot say.
        exactness: One of :data:`EXACTNESS`.
        exceptions: Name of a contract test to the sentence why it cannot hold for this method.
        offers: How it saves memory, weaker ways first, for a forecast that looks for a way to fit.

    Raises:
        ValueError: a word outside these vocabularies.
    """

    name: str
    kind: Kind
    factory: Callable[..., object] | str = ""
    paper: str = ""
    survey: str = ""
    effects: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    conflicts: Mapping[str, str] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    exactness: str = "exact"
    exceptions: Mapping[str, str] = field(default_factory=dict)
    offers: tuple[Offer, ...] = ()

    def __post_init__(self) -> None:
        words = self.name.split("_")
        if not all(word.isalnum() and word == word.lower() for word in words):
            raise ValueError(
                f"technique name {self.name!r}: use lower-case words joined by underscores, as token_drop."
            )
        for several in ("effects", "needs", "after", "offers"):
            given = getattr(self, several)
            if isinstance(given, str):
                raise ValueError(f"{several}={given!r} is one string: it needs a tuple, such as ({given!r},).")
        _one_of("kind", self.kind, KINDS)
        _one_of("exactness", self.exactness, EXACTNESS)
        for need in self.needs:
            _one_of("need", need, NEEDS)
        for effect in self.effects:
            verb, _, resource = effect.partition(" ")
            _one_of(f"verb of effect {effect!r}", verb, VERBS)
            _one_of(f"resource of effect {effect!r}", resource, RESOURCES)

    def touches(self, verb: str) -> frozenset[str]:
        """Resources named with ``verb``."""
        return frozenset(effect.partition(" ")[2] for effect in self.effects if effect.partition(" ")[0] == verb)

    def resolve(self) -> Callable[..., object]:
        """The factory itself, imported if the record names it by ``"module:attribute"``."""
        if not isinstance(self.factory, str):
            return self.factory
        module, _, attribute = self.factory.partition(":")
        return getattr(import_module(module), attribute)

    def build(self, **arguments: Any) -> object:
        """Build the Lightning object.

        Raises:
            TypeError: an argument that the technique does not take.
        """
        return self.resolve()(**arguments)


@hookspec
def eke_technique() -> Technique:
    """Return the technique that this distribution provides."""


def _one_of(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{what} is {value!r}. Use one of: {', '.join(allowed)}.")
