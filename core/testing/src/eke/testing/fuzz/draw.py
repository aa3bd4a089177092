"""Draws a case. The seed decides all of it, together with which techniques are installed."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from eke import compose, registry
from eke.testing.fuzz.arguments import draw_arguments, module_of, record_of
from eke.testing.fuzz.case import Case
from eke.testing.fuzz.subjects import SHAPES, fast_bf16, like, model_names

HOOKS = (  # of a callback, in which a run is killed or fails
    "on_train_batch_start", "on_before_backward", "on_after_backward", "on_before_optimizer_step",
    "on_before_zero_grad", "on_train_batch_end", "on_train_epoch_end", "on_validation_start", "on_validation_end",
)  # fmt: skip
BETWEEN = ("on_train_batch_end", "on_train_batch_start", "on_train_epoch_start", "on_train_epoch_end",
           "on_validation_end")  # fmt: skip  # in which a user saves by hand


def pool() -> list[str]:
    """Installed techniques that a random run can have, those of other authors among them: all but those whose modules
    say by ``MODELS = ()`` that they train none of the kit's models."""
    return [name for name in registry.available() if getattr(module_of(name), "MODELS", None) != ()]


def draw_case(seed: int, names: Sequence[str] | None = None, always: Sequence[str] = ()) -> Case:
    """The case of a seed.

    Args:
        seed: Decides everything.
        names: Techniques to choose from; :func:`pool` if not given.
        always: Techniques that every case has.
    """
    random = Random(seed)
    techniques = _techniques(random, list(pool() if names is None else names), list(always))
    model = _model(random, techniques)
    options = _options(random)
    if any(record_of(name).kind == "strategy" for name in techniques) and options.get("loader") == "own batches":
        del options["loader"]  # Lightning puts a sampler of its own in, and cannot
    if any("samples" in record_of(name).touches("replaces") for name in techniques):
        options.pop("ends_by", None)  # with other samples there are fewer steps than planned
    if any("loss" in record_of(name).touches("replaces") for name in techniques):
        # Some call no step of the user's, and what that logs is not there to go by.
        if options.get("schedule") == "plateau":
            options["schedule"] = "exponential"
        if options.get("beside") == "early stopping":
            del options["beside"]
    if random.random() < 0.1 and options.get("loader") not in ("own batches", "stateful", "iterable", "endless"):
        options["processes"] = 2
    arguments = {name: draw_arguments(random, name, model in SHAPES) for name in techniques}
    save = _save(random, options)
    if save["way"] == "after fit" and "averaging" in options.get("beside", ""):
        del options["beside"]  # Lightning leaves the average in the model
    return Case(model, arguments, options, save)


def _techniques(random: Random, names: list[str], always: list[str]) -> list[str]:
    count = random.choices((1, 2, 3, 4), (35, 35, 20, 10))[0]
    anything = random.random() < 0.1  # what goes together or is refused; else what no record speaks against
    found = list(always)
    for name in random.sample(names, len(names)):
        if len(found) >= max(count, len(always)):
            break
        together = [*found, name]
        if name not in found and (anything or _fit(together)):
            found.append(name)
    return random.sample(found, len(found))


def _fit(names: list[str]) -> bool:
    return bool(served(names)) and not compose.conflicts([record_of(name) for name in names])


def served(names: Sequence[str]) -> list[str]:
    """Models that all of these techniques train, as far as their modules say it by ``MODELS``."""
    said = [getattr(module_of(name), "MODELS", None) for name in names]
    return [model for model in model_names() if all(some is None or like(model) in some for some in said)]


def _model(random: Random, techniques: list[str]) -> str:
    fitting, share = served(techniques), random.random()
    if not fitting or share < 0.05:
        return random.choice(model_names())
    shapes = [name for name in fitting if name in SHAPES]
    return random.choice(shapes if shapes and share < 0.6 else fitting)


def _options(random: Random) -> dict[str, Any]:
    """Each option is drawn whether it is used or not, so that a case changes little where this list does."""

    def some(share: float, *values: Any) -> Any:
        drawn, value = random.random(), random.choice(values)
        return value if drawn < share else None

    drawn = {
        "dropout": some(0.3, 0.1),
        "optimizer": some(0.3, "adam", "sgd"),
        "groups": some(0.3, 2, 3),
        "schedule": some(0.75, "warmup", "onecycle", "cosine", "exponential", "plateau"),
        "interval": some(0.5, "epoch"),
        "frequency": some(0.2, 2),
        "epochs": some(0.3, 3),
        "batches": some(0.5, 3, 5, 6),
        "batch": some(0.4, 2, 4),
        "ragged": some(0.25, True),
        "accumulate": some(0.4, 2, 3),
        "clip": some(0.3, 0.1, 1.0),
        "clip_by": some(0.3, "value"),
        "precision": some(0.12, "64-true", "bf16-mixed", "bf16-true"),
        "limit": some(0.15, 2, 3),
        "validate": some(0.5, 1, 2),
        "val_check": some(0.3, 0.5, 2),
        "val_epochs": some(0.15, 2),
        "sanity": some(0.2, 1),
        "loader": some(0.75, "shuffle", "shuffle", "generator", "weighted", "replacement", "own batches", "stateful",
                       "iterable", "endless"),
        "augment": some(0.25, True),
        "workers": some(0.12, 1, 2),
        "persistent": some(0.4, True),
        "reload": some(0.12, 1, 2),
        "max_steps": some(0.2, 0.6, 0.8),
        "ends_by": some(0.08, "max_steps"),
        "beside": some(0.08, "early stopping", "accumulation", "averaging", "late averaging"),
        "interpreter": some(0.02, True),
    }  # fmt: skip
    options = {name: value for name, value in drawn.items() if value is not None}
    if options.get("loader") == "endless" and random.random() < 0.6:
        options.setdefault("max_steps", 0.8)  # without it, what goes by the length of the run is refused
    case = Case(options={name: value for name, value in options.items() if name != "max_steps"})
    batches = _batches(case)
    if "max_steps" in options:
        options["max_steps"] = max(2, round(options["max_steps"] * _steps(case) * case["epochs"]))
    if isinstance(options.get("val_check"), int) and options["val_check"] > batches:
        del options["val_check"]
    if options.get("loader") == "endless":
        options.pop("val_check", None)
    if "bf16" in options.get("precision", "") and not fast_bf16():
        del options["precision"]
    if options.get("beside") == "accumulation":
        options.pop("accumulate", None)  # Lightning takes one or the other
    for option, needs in (("val_check", "validate"), ("val_epochs", "validate"), ("sanity", "validate"),
                          ("clip_by", "clip"), ("persistent", "workers"), ("interval", "schedule"),
                          ("frequency", "schedule")):  # fmt: skip
        if needs not in options:
            options.pop(option, None)
    return options


def _save(random: Random, options: dict[str, Any]) -> dict[str, Any]:
    ways = {"steps": 25, "epochs": 12, "validation": 8, "hand": 20, "after fit": 8, "exception": 12, "kill": 15}
    way = random.choices(list(ways), list(ways.values()))[0]
    every, share, which = random.choice((1, 1, 2, 3)), random.uniform(0.1, 0.9), round(random.uniform(0, 0.9), 2)
    hook, between = random.choice(HOOKS), random.choice(BETWEEN)
    case = Case(options=options)
    if not case["validate"]:
        way = "epochs" if way == "validation" else way
        hook = "on_train_batch_end" if "validation" in hook else hook
        between = "on_train_batch_end" if "validation" in between else between
    epochs, steps = case["epochs"], case["epochs"] * _steps(case)
    if way in ("epochs", "validation"):
        return {"way": way, "every": min(every, epochs), "which": which}
    every = min(every, steps)
    if way == "steps":
        return {"way": way, "every": every, "which": which}
    if way == "after fit":
        return {"way": way, "at": max(1, round(share * (epochs - 1)))}
    times = {"on_train_epoch_start": epochs, "on_train_epoch_end": epochs, "on_before_optimizer_step": steps,
             "on_before_zero_grad": steps, "on_validation_start": epochs // case["val_epochs"],
             "on_validation_end": epochs // case["val_epochs"]}  # fmt: skip
    met = between if way == "hand" else hook
    at = max(1, round(share * times.get(met, epochs * _batches(case))))
    if way != "kill":
        return {"way": way, "hook": met, "at": at}
    first = every + 1 if met in ("on_before_optimizer_step", "on_before_zero_grad") else every * case["accumulate"] + 1
    return {"way": way, "hook": met, "at": at if "epoch" in met or "valid" in met else max(at, first), "every": every}


def _batches(case: Case) -> int:
    """In an epoch."""
    return min(case["batches"], case["limit"] or case["batches"])


def _steps(case: Case) -> int:
    """In an epoch."""
    return -(-_batches(case) // case["accumulate"])
