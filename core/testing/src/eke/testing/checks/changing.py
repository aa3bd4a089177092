"""What a resumed run says where the technique has other arguments than its checkpoint, is missing or was added."""

from __future__ import annotations

import copy
import inspect
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
from eke import ResumeError, Technique, argtypes
from eke.coordinator import arguments
from eke.strategies import arguments_of
from eke.technique import TechniqueCallback
from eke.testing.checks.common import REFUSALS, finite_losses
from eke.testing.checks.subject import Subject
from eke.testing.data import shuffled
from lightning.pytorch import Callback

_REACHES_STATES = ("module tree", "optimizer", "optimizer state")


def says_what_changed(subject: Subject, other: Callable[[], object] | None = None) -> None:
    """A run that resumes with another argument, without the technique or with one more, is refused in a sentence that
    names it, or goes on with a warning that names it: where the user says so, and where the numbers stay as they are.

    Args:
        subject: What is checked.
        other: Makes the technique with an argument that is another. By default one is found.
    """
    made = subject.build()
    if not isinstance(made, TechniqueCallback):
        return  # a strategy's checkpoint is the strategy's
    name, kind = subject.record.name, type(made).__name__
    exact = subject.record.exactness_of(arguments_of(made)) == "exact"
    changed = other() if other is not None else another(subject.build)
    with tempfile.TemporaryDirectory() as folder:
        ours, plain = Path(folder, "ours.ckpt"), Path(folder, "plain.ckpt")
        _until(subject, ours, subject.build(), Bystander())
        _until(subject, plain, Bystander())
        if changed is not None:
            found = arguments.changed(changed, arguments.of(made))
            assert found, f"{kind} was built with other arguments, and Eke sees the same: {arguments.of(made)}"
            words = (kind, next((one for one in found if one not in made.may_change), ""))
            _refused_or_told(subject, "resumed with another argument", exact, ours, words, changed, Bystander())
            again = other() if other is not None else another(subject.build)
            again.on_changed_arguments = "warn"
            what = "resumed with another argument and on_changed_arguments='warn'"
            _refused_or_told(subject, what, True, ours, words, again, Bystander())
        left_out = "resumed without it, beside another technique"
        _refused_or_told(subject, left_out, exact, ours, (repr(name),), Bystander())
        _refused_or_told(
            subject,
            "added at a resume",
            exact or getattr(subject.build(), "joins", False),
            plain,
            (repr(name),),
            subject.build(),
            Bystander(),
            before=True,
        )
        if not (exact or subject.touches(*_REACHES_STATES)):
            marked = [key for key in torch.load(ours)["callbacks"] if kind in key]
            assert marked, f"a file of {kind} does not tell Lightning that it was written with it"
            try:
                subject.fit(subject.model(seed=1), ckpt=ours, loader=shuffled, callbacks=[_Stop(1)])
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
                raise AssertionError(f"its checkpoint of mid-epoch does not resume without Eke: {problem}") from error


def another(build: Callable[[], object]) -> Any:
    """The same technique with one argument that is another and may not change unnoticed; None where none is found."""
    may_change = type(build()).may_change
    for candidate, found in _varied(build, lambda name: name not in may_change):
        if any(one not in may_change for one in found):
            return candidate
    return None


def steps_do_not_depend_on_what_may_change(subject: Subject) -> None:
    """With another value of an argument that ``may_change`` names, the same steps are taken but for rounding."""
    made = subject.build()
    if not getattr(made, "may_change", ()):
        return
    unknown = sorted(set(made.may_change) - set(inspect.signature(type(made).__init__).parameters))
    assert not unknown, f"may_change names no argument of {type(made).__name__}: {', '.join(unknown)}"
    losses = _losses(subject, made)
    tried: set[str] = set()
    for candidate, found in _varied(subject.build, lambda name: name in made.may_change):
        name = next(iter(found), None)
        if name is None or name in tried:
            continue
        tried.add(name)
        try:
            others = _losses(subject, candidate)
        except REFUSALS:  # what this machine does not have
            continue
        off = max(abs(one - other) for one, other in zip(losses, others, strict=True))
        assert off < 1e-3, (
            f"may_change names {name!r}, and with {arguments.of(candidate)[name]!r} losses differ by {off}"
        )


def _losses(subject: Subject, technique: object) -> list[float]:
    steps = subject.fit(subject.model(), technique, callbacks=[_Stop(subject.steps)]).state["steps"]
    return [step["loss"] for step in steps.values()]


def _varied(build: Callable[[], object], wanted: Callable[[str], bool]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The same technique with one argument that is another, and what of its arguments differs then."""
    made, given = build(), _given(build)
    hints = argtypes.of(type(made))
    for name, parameter in inspect.signature(type(made).__init__).parameters.items():
        if not wanted(name) or (parameter.default is parameter.empty and name not in given):
            continue
        for value in _others(given.get(name, parameter.default), hints.get(name)):
            try:
                candidate = type(made)(**{**given, name: value})
            except Exception:  # a value that it refuses by itself
                continue
            yield candidate, arguments.changed(candidate, arguments.of(made))


class Bystander(TechniqueCallback):
    """A technique that does nothing, so that one is there to object when another is missing."""

    technique = Technique(name="bystander", kind="callback", effects=("reads loss",))


class _Stop(Callback):
    """Ends a run after some batches, its checkpoint written if it has a place."""

    def __init__(self, batches: int, file: Path | None = None) -> None:
        self.batches, self.file = batches, file

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.batches -= 1
        if self.batches == 0:
            if self.file is not None:
                trainer.save_checkpoint(self.file)
            trainer.should_stop = True


def _until(subject: Subject, file: Path, *techniques: object) -> None:
    """Train into the second epoch, and no further than to its first batch."""
    subject.fit(subject.model(), *techniques, loader=shuffled, callbacks=[_Stop(subject.steps + 1, file)])


def _refused_or_told(
    subject: Subject,
    what: str,
    may_train: bool,
    file: Path,
    words: tuple[str, ...],
    *techniques: object,
    before: bool = False,
) -> None:
    refusals = REFUSALS if may_train or before else (ResumeError,)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            done = subject.fit(subject.model(seed=1), *techniques, ckpt=file, loader=shuffled, callbacks=[_Stop(2)])
        except refusals as error:
            said = str(error)
        except Exception as error:
            raise AssertionError(f"{what}, it ends in {type(error).__name__}: {error}") from error
        else:
            said = " ".join(str(one.message) for one in caught if str(one.message).startswith("Eke:"))
            assert may_train, f"{what}, it goes on as another run" + (
                f" and says: {said}" if said else " and says nothing"
            )
            assert said, f"{what}, it goes on and says nothing"
            finite_losses(done.state)
    for word in words:
        assert word in said, f"{what}, it does not name {word}: {said}"


def _given(build: Callable[[], object]) -> dict[str, Any]:
    """The arguments with which ``build`` builds, by name, as they are."""
    kind = type(build())
    own = vars(kind).get("__init__")
    constructor, calls = kind.__init__, []

    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(inspect.signature(constructor).bind(self, *args, **kwargs))
        constructor(self, *args, **kwargs)

    kind.__init__ = watched
    try:
        build()
    finally:
        if own is None:
            del kind.__init__
        else:
            kind.__init__ = own
    flat: dict[str, Any] = {}
    for name, value in list(calls[0].arguments.items())[1:]:
        several = calls[0].signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        flat.update(value if several else {name: value})
    return flat


def _others(value: Any, wanted: Any) -> Iterator[Any]:
    """Values that an argument may have in place of one."""
    for one in (wanted, *get_args(wanted)):
        if get_origin(one) is Literal:
            yield from (word for word in get_args(one) if word != value)
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, 2 * value, value // 2)
    elif isinstance(value, float):
        yield from (value / 2, (value + 1) / 2, value + 1)
    elif isinstance(value, (list, tuple)) and value:
        for one in _others(value[-1], None):
            yield [*value[:-1], one]
    elif isinstance(value, dict):
        for key in value:
            for one in _others(value[key], None):
                yield {**value, key: one}
    elif value is None:
        plain = {int: 1, float: 0.5, str: "*"}
        yield from (plain[one] for one in get_args(wanted) if one in plain)
    elif wanted is not None and not isinstance(value, (str, type)) and hasattr(value, "__dict__"):
        for key, held in vars(value).items():  # an object that was built by numbers
            for one in _others(held, None) if not key.startswith("_") else ():
                changed = copy.copy(value)
                setattr(changed, key, one)
                yield changed
