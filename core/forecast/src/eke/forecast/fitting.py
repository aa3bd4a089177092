"""What would fit a GPU: the largest batch, and the first change to a run that makes it fit.

Changes come from the records of the installed techniques, and three from the Trainer itself. Each is tried by a dry
run, in the order of what it costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from eke import registry
from eke.forecast.dry_run import Forecast, forecast
from eke.forecast.errors import ForecastError
from eke.spec import COSTS, EkeError, Offer


@dataclass(frozen=True)
class Setup:
    """A run as a forecast sees it.

    Args:
        build: Returns the model and a batch.
        recipe: Technique name to its arguments.
        ranks: Number of processes.
        batch_size, length: Of the batch; None for those that ``build`` gives.
        accumulate: Batches a step.
        device: What it runs on.
        options: Further arguments of the Trainer, such as ``precision``.
    """

    build: Callable[[], Any]
    recipe: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ranks: int = 1
    batch_size: int | None = None
    length: int | None = None
    accumulate: int = 1
    device: str = "cpu"
    options: Mapping[str, Any] = field(default_factory=dict)

    def forecast(self) -> Forecast:
        """As :func:`eke.forecast.forecast`."""
        return forecast(
            self.build, lambda: registry.trainer_kwargs(**self.recipe), self.ranks, self.batch_size, self.length,
            self.accumulate, self.device, **self.options,
        )  # fmt: skip


@dataclass(frozen=True)
class Change:
    """One change to a run, or several together.

    Attributes:
        words: What is changed, as a person would write it.
        cost: What it costs, of :data:`eke.spec.COSTS`; of several the last.
        setup: The run with it.
        forecast: Its memory.
    """

    words: str
    cost: str
    setup: Setup
    forecast: Forecast


def largest_batch(setup: Setup, budget: int, given: Forecast, samples: int) -> tuple[int, Forecast | None]:
    """The largest number of samples in a batch whose step fits.

    Two dry runs tell what a sample takes; others settle the rest, because memory does not grow quite evenly.

    Args:
        setup: The run.
        budget: Bytes of the GPU's memory.
        given: Its forecast as it is.
        samples: How many samples its batch has.

    Returns:
        The number, 0 where not even one fits, and its forecast.
    """
    known = {samples: given}

    def total(size: int) -> int:
        if size not in known:
            known[size] = replace(setup, batch_size=size).forecast()
        return known[size].total

    other = samples * 2
    slope = (total(other) - total(samples)) / samples
    guess = max(1, int(samples + (budget - total(samples)) / slope)) if slope > 0 else other
    for _ in range(12):
        if total(guess) > budget:
            if guess == 1:
                return 0, None
            guess = max(1, min(guess - 1, guess - int((total(guess) - budget) / slope)))
        elif total(guess + 1) <= budget:
            guess += max(1, int((budget - total(guess + 1)) / slope))
        else:
            break
    return guess, known[guess]


def changes(setup: Setup, samples: int) -> Iterator[tuple[str, str, Setup]]:
    """Words, cost and run of each single change that there is, those that cost least first."""
    found: list[tuple[str, str, Setup]] = []
    if setup.options.get("precision", "32-true") in ("32-true", "32", 32):
        found.append(("precision=bf16-mixed", "rounding", _with_option(setup, "precision", "bf16-mixed")))
    for name in registry.available():
        for offer in _stronger(_offers(name), setup.recipe.get(name)):
            if setup.ranks >= offer.ranks:
                changed = {**setup.recipe, name: {**setup.recipe.get(name, {}), **offer.arguments}}
                if changed != dict(setup.recipe):
                    found.append((_words(name, offer.arguments), offer.cost, replace(setup, recipe=changed)))
    size = setup.batch_size or samples
    while size > 1:
        size //= 2
        accumulate = setup.accumulate * (setup.batch_size or samples) // size
        halved = replace(setup, batch_size=size, accumulate=accumulate)
        found.append((f"batch={size} accumulate={accumulate}", "smaller batches", halved))
    yield from sorted(found, key=lambda one: COSTS.index(one[1]))


def make_fit(setup: Setup, budget: int, given: Forecast, samples: int) -> tuple[list[Change], Change | None]:
    """Try single changes in the order of their cost; where none is enough, add up those that help.

    Returns:
        What was tried, in order, and the one that fits, or None.
    """
    tried: list[Change] = []
    helping: list[tuple[str, str, Setup]] = []
    for words, cost, changed in changes(setup, samples):
        result = _try(words, cost, changed)
        if result is None:
            continue
        tried.append(result)
        if result.forecast.total <= budget:
            return tried, result
        if result.forecast.total < given.total:
            helping.append((words, cost, changed))
    together, lowest = setup, given
    for _, cost, changed in helping:
        merged = _merged(together, setup, changed)
        result = _try(_difference(setup, merged), cost, merged)
        if result is None or result.forecast.total >= lowest.total:
            continue
        if together is not setup:
            tried.append(result)
        together, lowest = merged, result.forecast
        if lowest.total <= budget:
            return tried, result
    return tried, None


def _try(words: str, cost: str, setup: Setup) -> Change | None:
    """A change and its forecast; None where it does not go with the rest of the run."""
    try:
        return Change(words, cost, setup, setup.forecast())
    except ForecastError:
        return None
    except EkeError:
        return None
    except Exception as error:  # a refusal of Lightning's or of a technique's, in whatever class
        if isinstance(error, (KeyboardInterrupt, MemoryError)):
            raise
        return None


def _merged(together: Setup, before: Setup, changed: Setup) -> Setup:
    """What ``changed`` changed in ``before``, applied to ``together``."""
    recipe = {name: dict(arguments) for name, arguments in together.recipe.items()}
    for name, arguments in changed.recipe.items():
        new = {key: value for key, value in arguments.items() if before.recipe.get(name, {}).get(key) != value}
        if new or name not in before.recipe:
            recipe[name] = {**recipe.get(name, {}), **new}
    options = {**together.options, **{k: v for k, v in changed.options.items() if before.options.get(k) != v}}
    merged = replace(together, recipe=recipe, options=options)
    if changed.batch_size != before.batch_size:
        merged = replace(merged, batch_size=changed.batch_size, accumulate=changed.accumulate)
    return merged


def _with_option(setup: Setup, name: str, value: Any) -> Setup:
    return replace(setup, options={**setup.options, name: value})


def _offers(name: str) -> tuple[Offer, ...]:
    try:
        return registry.get(name).offers
    except EkeError:  # broken; it hurts only who asks for it
        return ()


def _stronger(offers: tuple[Offer, ...], given: Mapping[str, Any] | None) -> tuple[Offer, ...]:
    """Those that go beyond what the run has already: a record names weaker ones first."""
    had = [i for i, one in enumerate(offers) if given is not None and one.arguments.items() <= given.items()]
    return offers[had[-1] + 1 :] if had else offers


def _words(name: str, arguments: Mapping[str, Any]) -> str:
    given = [f"{key}={str(value).lower() if value is True else value}" for key, value in arguments.items()]
    return f"{name}:{','.join(given)}" if given else name


def _difference(before: Setup, after: Setup) -> str:
    """What was changed, in the words in which a person would ask for it."""
    words = [f"{key}={value}" for key, value in after.options.items() if before.options.get(key) != value]
    for name, arguments in after.recipe.items():
        known = before.recipe.get(name)
        if known != arguments:
            words.append(_words(name, {k: v for k, v in arguments.items() if known is None or known.get(k) != v}))
    if after.batch_size != before.batch_size:
        words.append(f"batch={after.batch_size} accumulate={after.accumulate}")
    return " ".join(words)
