"""What a technique tells the core: one hook that returns one record. Imports neither torch nor lightning."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

import pluggy

from eke.survey import KEYS, TOPICS

hookspec = pluggy.HookspecMarker("eke")
hookimpl = pluggy.HookimplMarker("eke")

Kind = Literal["callback", "plugin", "strategy"]

KINDS = ("callback", "plugin", "strategy")

# An effect is a verb and a resource, such as "changes weights". Of the first three, two that replace one resource
# exclude each other; otherwise replacing comes before changing, and changing before reading. The last orders nothing.
VERBS: dict[str, str] = {
    "replaces": "puts its own in the place of what was there, so that two of them exclude each other",
    "changes": "works on what is there, so that several of them can follow one another",
    "reads": "goes by it and leaves it as it is, so that it acts after those who change it",
    "keeps": "relies on it as it is, so that nobody else may replace or change it",
}

ORDERED = ("replaces", "changes", "reads")  # who acts earlier

# Word to definition, in the order in which a run meets them: where verbs leave the order open, this decides.
RESOURCES: dict[str, str] = {
    "samples": "which samples of the data an epoch has, and in which order",
    "batch content": "what stands in the samples of a batch: masked tokens, shorter sequences, smaller images",
    "batch subset": "which samples of a batch are trained on",
    "module tree": "the modules of a model, and the names and shapes of their parameters",
    "attention": "which pairs of tokens attend to each other, and by which kernel",
    "precision": "the number formats in which layers compute",
    "requires_grad": "which parameters train",
    "weights": "values of parameters, other than by the optimizer's step",
    "tokens": "which tokens of a sequence pass through the blocks",
    "hidden states": "what modules hand on to each other in forward, and which blocks run",
    "saved tensors": "what autograd keeps from forward to backward, and in which form",
    "batch sharding": "which process trains on which samples of a step (data parallelism)",
    "parameter sharding": "which process holds which part of a parameter (tensor parallelism, ZeRO stage 3, FSDP)",
    "layer sharding": "which process holds which layers (pipeline parallelism)",
    "optimizer sharding": "which process holds which part of the optimizer's states (ZeRO stage 1)",
    "optimizer": "the class of the optimizer, its parameter groups and their settings other than the learning rate",
    "optimizer state": "what the optimizer remembers of each parameter, other than by its own step",
    "loss": "how the loss follows from what the model gives",
    "gradients": "what the optimizer steps by, other than by backward",
    "learning rate": "the learning rate of each group at each step",
    "weights-at-eval": "the weights that validation and saved models have in place of the training weights",
}

# Method of a technique to the resources that are settled there: who acts first at it follows from these alone.
SEAMS: dict[str, tuple[str, ...]] = {
    "alter_model": (
        "module tree",
        "attention",
        "precision",
        "requires_grad",
        "tokens",
        "hidden states",
        "saved tensors",
        "parameter sharding",
        "layer sharding",
    ),
    "initialize": ("weights",),
    "alter_optimizer": ("optimizer", "optimizer state", "optimizer sharding"),
    "alter_schedulers": ("learning rate",),
    "alter_loader": ("samples", "batch sharding"),
    "begin_samples": ("samples",),
    "alter_batch": ("batch content",),
    "alter_eval_batch": ("batch content",),
    "around_step": ("batch subset", "loss"),
    "before_optimizer_step": ("gradients",),
    "after_optimizer_step": ("weights", "optimizer state"),
    "eval_weights": ("weights-at-eval",),
}

# What a strategy may impose on techniques: word to what it means, and to the resources that it concerns. A technique
# that touches none of those bears it; another one has to say so, by ``tolerates``.
IMPOSITIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "sharded optimizer": (
        "each process's optimizer holds the states of a part of the parameters",
        ("optimizer", "optimizer state"),
    ),
    "sharded gradients": ("after backward each process holds a part of each gradient", ("gradients",)),
    "sharded parameters": (
        "each process holds a part of each parameter",
        ("module tree", "requires_grad", "weights", "optimizer state", "weights-at-eval"),
    ),
    "gathered states": (
        "a checkpoint's optimizer states are put together by the shapes of the parameters",
        ("optimizer state",),
    ),
    "own optimizer": (
        "it steps by itself, with gradients and states that nobody else reaches",
        ("gradients", "optimizer state", "weights-at-eval"),
    ),
    "awaited blocks": (
        "processes wait for one another in each block, in the order of the first step",
        ("hidden states",),
    ),
}

# What a technique may ask of a run. The coordinator checks each by name before the first step.
NEEDS = ("automatic optimization", "one optimizer", "sized training data")

# From strongest promise to weakest: what a technique does to the numbers of a run.
EXACTNESS: dict[str, str] = {
    "exact": "losses and gradients are the same bit for bit",
    "reordered sums": "the same but for rounding: sums are taken in another order, or by another kernel",
    "unbiased": "gradients vary more, or otherwise; their mean over what is drawn is the same",
    "approximate": "gradients or states are near to what they were",
    "model-changing": "another model is trained, on other data, or towards another loss",
}


# What saving memory costs, from what a run notices least to what it notices most: the order in which a forecast tries.
COSTS = ("rounding", "communication", "smaller batches", "recomputing", "transfers")


class EkeError(Exception):
    """The core cannot give what was asked of it."""


class ConflictError(EkeError):
    """Techniques that cannot work together were put into one run."""


class ArgumentError(EkeError, ValueError):
    """An argument of a technique, or of a function of Eke's, that makes no sense: found before anything is touched."""


class ResumeError(ConflictError, ValueError):
    """A checkpoint and the run that should go on from it do not belong together."""


class NoEffectWarning(UserWarning):
    """A technique was switched on and found nothing to act on."""


class NoGradientWarning(NoEffectWarning):
    """Something that the optimizer holds is not reached by the loss: the model's doing, or a technique's."""


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
        does: One sentence for ``eke list``: what it does, in the field's words, in ninety characters or so.
        topics: Where it belongs in "A Survey on Efficient Training of Transformers", of
            :data:`eke.survey.TOPICS`, the first first. Empty where the survey has no place for it.
        survey: What of the survey its methods serve, all of it: keys of :data:`eke.survey.ENTRIES`, such as ``"lora"``.
        effects: What it does to a run, each ``"<verb> <resource>"`` of :data:`VERBS` and :data:`RESOURCES`.
        needs: What it asks of a run, of :data:`NEEDS`.
        conflicts: Technique name to the reason why both cannot run together. For what effects cannot say.
        after: Names of techniques that must act earlier. For what effects cannot say.
        exactness: What becomes of the numbers, one of :data:`EXACTNESS`. Where that depends on its arguments, a
            function of those that matter, by name and with their defaults.
        exceptions: Name of a contract test to the sentence why it cannot hold for this method.
        offers: How it saves memory, weaker ways first, for a forecast that looks for a way to fit.
        imposes: Of a strategy: what techniques have to bear under it, of :data:`IMPOSITIONS`. Where that depends on its
            arguments, a function of those that matter, by name and with their defaults.
        tolerates: What it bears although it touches what that concerns. A tuple, or a function in the same way.
        intolerance: Why it cannot bear the rest, and what to do: ends the words of a refusal.

    Raises:
        ValueError: a word outside these vocabularies.
    """

    name: str
    kind: Kind
    factory: Callable[..., object] | str = ""
    paper: str = ""
    does: str = ""
    topics: tuple[str, ...] = ()
    survey: tuple[str, ...] = ()
    effects: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    conflicts: Mapping[str, str] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    exactness: str | Callable[..., str] = "exact"
    exceptions: Mapping[str, str] = field(default_factory=dict)
    offers: tuple[Offer, ...] = ()
    imposes: tuple[str, ...] | Callable[..., tuple[str, ...]] = ()
    tolerates: tuple[str, ...] | Callable[..., tuple[str, ...]] = ()
    intolerance: str = ""

    def __post_init__(self) -> None:
        words = self.name.split("_")
        if not all(word.isalnum() and word == word.lower() for word in words):
            raise ArgumentError(
                f"technique name {self.name!r}: use lower-case words joined by underscores, as token_drop."
            )
        for several in ("topics", "survey", "effects", "needs", "after", "offers", "imposes", "tolerates"):
            given = getattr(self, several)
            if isinstance(given, str):
                raise ArgumentError(f"{several}={given!r} is one string: it needs a tuple, such as ({given!r},).")
        _one_of("kind", self.kind, KINDS)
        if not callable(self.exactness):
            _one_of("exactness", self.exactness, EXACTNESS)
        for need in self.needs:
            _one_of("need", need, NEEDS)
        for effect in self.effects:
            verb, _, resource = effect.partition(" ")
            _one_of(f"verb of effect {effect!r}", verb, VERBS)
            _one_of(f"resource of effect {effect!r}", resource, RESOURCES)
        for topic in self.topics:
            _one_of("topic", topic, TOPICS)
        for key in self.survey:
            if key not in KEYS:
                raise ArgumentError(
                    f"survey names {key!r}, which is no key of eke.survey. `eke list --survey` prints them."
                )
        for words in (self.imposes, self.tolerates):
            if not callable(words):
                _impositions(words)

    def touches(self, verb: str) -> frozenset[str]:
        """Resources named with ``verb``."""
        return frozenset(effect.partition(" ")[2] for effect in self.effects if effect.partition(" ")[0] == verb)

    def touched(self) -> frozenset[str]:
        """Resources named with any verb."""
        return frozenset(effect.partition(" ")[2] for effect in self.effects)

    def imposed(self, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """What it imposes when it is built with these arguments."""
        return _impositions(_by_arguments(self.imposes, arguments))

    def tolerated(self, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """What it bears when it is built with these arguments."""
        return _impositions(_by_arguments(self.tolerates, arguments))

    def exactness_of(self, arguments: Mapping[str, Any]) -> str:
        """What becomes of the numbers when it is built with these arguments."""
        found = _by_arguments(self.exactness, arguments)
        _one_of("exactness", found, EXACTNESS)
        return found

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


def _by_arguments(said: Any, arguments: Mapping[str, Any]) -> Any:
    if not callable(said):
        return said
    asked = inspect.signature(said).parameters
    return said(**{name: value for name, value in arguments.items() if name in asked})


def _impositions(words: tuple[str, ...]) -> tuple[str, ...]:
    for word in words:
        _one_of("what is imposed or tolerated", word, IMPOSITIONS)
    return words


def _one_of(what: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ArgumentError(f"{what} is {value!r}. Use one of: {', '.join(allowed)}.")
