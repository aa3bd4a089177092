"""Several techniques in one run: the same result in both list orders and after a resume, or a refusal.

Two are checked by :func:`check_pair`. All pairs of many techniques are covered by fewer runs of several at once
(:mod:`eke.testing.covering`); where such a run fails, :func:`check_together` names the smallest part of it that does.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import eke
from eke import registry
from eke.testing import run
from eke.testing.checks import REFUSALS, comparable
from eke.testing.compare import assert_same
from eke.testing.data import shuffled
from eke.testing.models import SHAPES, TinyBlocks, TinyModel
from eke.testing.ranks import run_alone
from lightning.pytorch.callbacks import ModelCheckpoint

AFTER_STEPS = 6  # of 12: in the middle of the second epoch

Build = Callable[[], object]


def build_example(name: str) -> Any:
    """Build an installed technique with the arguments that its entry module names as ``EXAMPLE``, or with its defaults.

    ``EXAMPLE`` is for a technique that does nothing in a run of a dozen steps otherwise, or has an argument that
    must be given: ``EXAMPLE = {"stages": [0.3]}``.
    """
    arguments = getattr(registry.available()[name].load(), "EXAMPLE", {})
    return eke.create(name, **arguments)


def example_model(*names: str) -> type[TinyModel] | None:
    """The first of the kit's models that all of these techniques train, as their entry modules say it by ``MODELS``:
    names of classes, ``MODELS = ("TinyViT",)``, all of them where nothing is said. None where they have none in common.
    """
    served = [getattr(registry.available()[name].load(), "MODELS", None) for name in names]
    return next((one for one in SHAPES if all(some is None or one.__name__ in some for some in served)), None)


def check_pair(
    first: Build,
    second: Build,
    model: type[TinyModel] = TinyBlocks,
    random: bool = True,
    **options: Any,
) -> str | None:
    """Train with both in both list orders; a run cut in mid-epoch in one order goes on in the other.

    That is three trainings: one in each order, whose refusals are the refusals of the pair and whose ends have to be
    equal, and the second half of one from the checkpoint that the first wrote in passing.

    Args:
        first: Builds one technique.
        second: Builds the other.
        model: What they train.
        random: Whether the global random state is compared too. Two plain callbacks do not keep it.
        options: For :func:`eke.testing.fit`.

    Returns:
        The words of the refusal where they refuse each other, None where they work together.

    Raises:
        AssertionError: the orders end in different states, a resumed run ends elsewhere than an unbroken one, or
            only one order is refused.
    """
    return _check([first, second], model, random, options)


def check_together(
    builds: Mapping[str, Build], model: type[TinyModel] = TinyBlocks, random: bool = True, **options: Any
) -> dict[tuple[str, str], str]:
    """:func:`check_pair` for several at once, in the order given and in the opposite one.

    Where two of them refuse each other, the others are checked with the one and with the other.

    Args:
        builds: Name of a technique to what builds it.
        model, random, options: As for :func:`check_pair`.

    Returns:
        Names of pairs that refuse each other, to the words.

    Raises:
        AssertionError: as for a pair; of the techniques it names the fewest that fail together.
    """
    try:
        refusal = _check(list(builds.values()), model, random, options)
    except AssertionError as error:
        raise AssertionError(_narrowed(dict(builds), model, random, options, error)) from error
    if refusal is None or len(builds) < 2:
        return {}
    for pair in combinations(builds, 2):
        words = _refuses([builds[name] for name in pair], model, options)
        if words is not None:
            found = {pair: words}
            if len(builds) > 2:
                for left_out in pair:
                    rest = {name: build for name, build in builds.items() if name != left_out}
                    found |= check_together(rest, model, random, **options)
            return found
    raise AssertionError(f"{', '.join(builds)} are refused together, and no two of them are: {refusal}")


def _narrowed(
    builds: dict[str, Build], model: type[TinyModel], random: bool, options: dict[str, Any], error: AssertionError
) -> str:
    """Leave out one technique after another as long as the rest still fails; the words for what is left."""
    whole = ", ".join(builds)
    for name in list(builds):
        rest = {other: build for other, build in builds.items() if other != name}
        if not rest:
            break
        try:
            _check(list(rest.values()), model, random, options)
        except AssertionError as smaller:
            builds, error = rest, smaller
    least = " + ".join(builds)
    return f"{least} fail together (found in a run of {whole}): {error}"


def _check(builds: list[Build], model: type[TinyModel], random: bool, options: dict[str, Any]) -> str | None:
    options = {"loader": shuffled, **options}

    def in_order() -> list[object]:
        return [build() for build in builds]

    def reversed_order() -> list[object]:
        return [build() for build in reversed(builds)]

    with tempfile.TemporaryDirectory() as folder:
        save = ModelCheckpoint(folder, "{step}", every_n_train_steps=AFTER_STEPS, save_top_k=-1)
        ckpt = Path(folder, f"step={AFTER_STEPS}.ckpt")
        one = run_alone(lambda: _outcome(model, in_order, options, save))
        other = run_alone(lambda: _outcome(model, reversed_order, options))
        refusals = [outcome for outcome in (one, other) if isinstance(outcome, str)]
        if refusals:
            assert len(refusals) == 2, f"refused in one order only: {refusals[0]}"
            assert len(refusals[0]) >= 20, f"a refusal has to say why; it said {refusals[0]!r}"
            return refusals[0]
        assert_same(one, other, "the callbacks in one order, then in the other")
        assert ckpt.exists(), f"the run ended before {AFTER_STEPS} steps, so nothing could be resumed"
        left_over = {"seed": 1, "ckpt": ckpt, **options}
        resumed = run_alone(lambda: run.fit(model(seed=1), *reversed_order(), **left_over).state)
        left = list(resumed["steps"])
        assert left, "the resumed run trained no batch"
        assert left == list(one["steps"])[-len(left) :], f"the resumed run trained other batches: {left}"
        pair = [comparable(state, random, left) for state in (one, resumed)]
        assert_same(
            *pair, "an unbroken run, then one that went on from its checkpoint with callbacks in the other order"
        )
    return None


def _outcome(
    model: type[TinyModel], build: Callable[[], list[object]], options: dict[str, Any], *callbacks: Any
) -> dict[str, Any] | str:
    """The state after a run, or the words of its refusal."""
    try:
        return run.fit(model(), *build(), callbacks=callbacks, **options).state
    except REFUSALS as error:
        return str(error)


def _refuses(builds: list[Build], model: type[TinyModel], options: dict[str, Any]) -> str | None:
    """The words in which they refuse each other, in a run of one step."""
    found = run_alone(lambda: _outcome(model, lambda: [one() for one in builds], {**options, "max_steps": 1}))
    return found if isinstance(found, str) else None
