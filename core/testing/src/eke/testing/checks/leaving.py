"""A technique leaves alone what is not its own: other runs, random state, the model, what its record does not name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eke.strategies import arguments_of
from eke.testing import count
from eke.testing.checks.common import empty_folder, finite_losses, learning_rates, some, trace
from eke.testing.checks.subject import Subject
from eke.testing.compare import assert_same, class_attributes, copied, differences, footprint
from eke.testing.models import TinyModel, tensors
from eke.testing.ranks import run_alone
from lightning.pytorch import Callback, LightningModule

CORE = 60  # Python calls of the core's own in a step: it notes where the run stands, for a checkpoint of that moment


def changes_nothing_when_off(subject: Subject) -> None:
    """Built, copied and used in another run, it changes nothing in a run that does not have it."""

    def with_it_around() -> dict[str, Any]:
        technique = subject.build()
        copy.deepcopy(technique)
        subject.fit(subject.model(seed=2), technique)
        return subject.fit(subject.model(dropout=0.1)).state

    alone = run_alone(lambda: subject.fit(subject.model(dropout=0.1)).state)
    assert_same(alone, run_alone(with_it_around), "state of a run that never had it, then of one beside it")
    if subject.idle is not None:
        parts = ("weights", "steps", "optimizers", "random")
        idle = run_alone(lambda: subject.fit(subject.model(dropout=0.1), subject.idle()).state)
        pair = [{part: state[part] for part in parts} for state in (alone, idle)]
        assert_same(*pair, "state of a run without it, then with it switched off")


def leaves_the_random_state_alone(subject: Subject) -> None:
    """It draws no number from the global random states of torch, Python and numpy."""
    without = subject.fit(subject.model()).state
    with_it = subject.fit(subject.model(), subject.build()).state
    names = with_it["steps"] if subject.chooses_samples else without["steps"]
    traces = [
        {
            **{name: step["random state"] for name, step in state["steps"].items() if name in names},
            "end": state["random"],
        }
        for state in (without, with_it)
    ]
    assert_same(*traces, "checksum of the global random state without it, then with it")


def leaves_the_model_as_it_was(subject: Subject) -> None:
    """After a run no class, hook, attribute or replaced method of it is left on the model, nor on any class."""
    plain, model = subject.model(), subject.model()
    subject.fit(plain, validate=True)
    classes = class_attributes(model)
    subject.fit(model, subject.build(), validate=True)
    _assert_untouched(plain, model, "after a run")
    assert_same(classes, class_attributes(model), "attributes of the model's classes before a run, then after it")


def does_what_its_record_says(subject: Subject) -> None:
    """What the record does not declare stays as in a run without it, and numbers are as exact as it says."""
    without = subject.fit(subject.model()).state
    with_it = subject.fit(subject.model(), subject.build()).state
    if subject.chooses_samples:
        without["steps"] = {name: step for name, step in without["steps"].items() if name in with_it["steps"]}
    undeclared = []

    def compare(resources: tuple[str, ...], what: str, take: Callable[[dict[str, Any]], Any]) -> None:
        if not subject.touches(*resources) and (found := differences(take(without), take(with_it))):
            undeclared.append(f"{what} changed, and {' or '.join(map(repr, resources))} is not declared: {found[0]}")

    compare(("learning rate",), "the learning rate", learning_rates)
    compare(("requires_grad", "module tree"), "requires_grad", lambda state: trace(state, "frozen"))
    compare(("samples", "batch content", "batch subset"), "the batches", lambda state: trace(state, "batch"))
    compare(("module tree",), "names and shapes of weights", lambda state: _shapes(state["weights"]))
    compare(("optimizer",), "the class of the optimizer", lambda state: state["optimizer classes"])
    assert not undeclared, "\n".join(undeclared)
    record, built = subject.record, subject.build()
    exactness = record.exactness_of(arguments_of(built)) if record else "model-changing"
    tolerance = {"exact": 0.0, "reordered sums": subject.tolerance}.get(exactness)
    if tolerance is not None:
        what = f"weights without it, then with it (its record says {exactness!r})"
        assert_same(without["weights"], with_it["weights"], what, tolerance)


def fails_cleanly(subject: Subject, where: str) -> None:
    """When user code raises, the model stands as it would without the technique, and a second fit works.

    Args:
        subject: What is checked.
        where: ``"training_step"``, ``"validation_step"``, ``"configure_optimizers"`` or ``"on_fit_start"``.
    """
    with empty_folder() as folder:
        plain, model, technique = _failing(subject.model, where), _failing(subject.model, where), subject.build()
        classes = class_attributes(model)
        watch = _LastWeights()
        _fit_that_fails(subject, plain)
        _fit_that_fails(subject, model, technique, callbacks=[watch], default_root_dir=folder)
        what = f"after an exception in {where}"
        _assert_untouched(plain, model, what)
        assert_same(classes, class_attributes(model), f"attributes of the model's classes before, then {what}")
        now = copied(dict(tensors(model)))
        shared = [name for name in watch.weights if name in now and now[name].shape == watch.weights[name].shape]
        pair = [{name: weights[name] for name in shared} for weights in (watch.weights, now)]
        assert_same(*pair, f"weights when the last batch began or ended, then {what}")
        left = sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())
        assert not left, f"files left {what}: {some(left)}"
        model.fails = False
        again = subject.fit(model, technique, validate=True, default_root_dir=folder)
        finite_losses(again.state)
        plain.fails = False
        subject.fit(plain, validate=True)
        _assert_untouched(plain, model, f"after a second fit {what}")


def costs_nothing_when_idle(subject: Subject) -> None:
    """Where it has nothing to do in a step, it adds no operator and few Python calls over an empty callback."""
    build = subject.idle or subject.build
    calls = [_least(subject, technique, count.CountCalls()) for technique in (Callback(), build())]
    operators = [_least(subject, technique, count.CountOperators()) for technique in (Callback(), build())]
    advice = (
        "That is with nothing to do."
        if subject.idle
        else "What acts in each step returns from idle() an object that has nothing to do, or names this test in its "
        "exceptions with the reason."
    )
    # The core copies each tensor of a state that has changed in a batch, for a checkpoint of that moment.
    copies = subject.epochs * subject.steps if subject.record is not None and build().state_dict() else 0
    assert operators[1] <= operators[0] + copies, (
        f"{operators[1] - operators[0]} operators more than an empty callback's run. {advice}"
    )
    extra = calls[1] - calls[0]
    allowed = subject.extra_calls + (CORE if subject.record is not None else 0)
    assert extra <= allowed, (
        f"{extra} Python calls a step more than an empty callback's run ({calls[0]}); allowed: {allowed}. {advice}"
    )


class _LastWeights(Callback):
    """The weights when a batch begins, after what techniques do to them there, and when it is through."""

    def __init__(self) -> None:
        self.weights: dict[str, Any] = {}

    def on_train_batch_start(self, trainer: Any, model: LightningModule, *_: Any) -> None:
        self.weights = copied(dict(tensors(model)))

    def on_train_batch_end(self, trainer: Any, model: LightningModule, *_: Any) -> None:
        self.weights = copied(dict(tensors(model)))


def _failing(model: type[TinyModel], where: str) -> TinyModel:
    """A model that raises at ``where``: in the training step at the sixth batch, elsewhere at the first call."""

    def raises(self: Any, *arguments: Any, **named: Any) -> Any:
        late = where != "training_step" or self.trainer.fit_loop.total_batch_idx >= 5
        if self.fails and late:
            raise _UserError(where)
        return getattr(model, where)(self, *arguments, **named)

    if where == "training_step":

        def method(self: Any, batch: Any, batch_idx: int) -> Any:
            return raises(self, batch, batch_idx)

    elif where == "validation_step":

        def method(self: Any, batch: Any, batch_idx: int) -> Any:
            return raises(self, batch, batch_idx)

    else:

        def method(self: Any) -> Any:
            return raises(self)

    built = type(f"Failing{model.__name__}", (model,), {where: method, "fails": True})()
    built.fails = True
    return built


class _UserError(Exception):
    pass


def _fit_that_fails(subject: Subject, model: TinyModel, *techniques: object, **options: Any) -> None:
    try:
        subject.fit(model, *techniques, validate=True, **options)
    except _UserError:
        return
    raise AssertionError("the exception of the user's code did not come through")


def _assert_untouched(plain: LightningModule, model: LightningModule, when: str) -> None:
    """Compare the modules that both have: a technique may add some, if what it adds trains like any other."""
    without, with_it = footprint(plain), footprint(model)
    shared = [name for name in without if name in with_it]
    pair = [{name: stands[name] for name in shared} for stands in (without, with_it)]
    assert_same(*pair, f"how the model's modules stand {when} without it, then with it")


def _least(subject: Subject, technique: object, counter: Any) -> int:
    subject.fit(subject.model(), technique, callbacks=[counter])
    return min(counter.per_step)


def _shapes(weights: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in weights.items()}
