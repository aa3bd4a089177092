"""Two techniques in one run: the same result in both list orders and after a resume, or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import eke
from eke import registry
from eke.testing import run
from eke.testing.checks import REFUSALS, comparable
from eke.testing.compare import assert_same
from eke.testing.data import shuffled
from eke.testing.models import SHAPES, TinyBlocks, TinyModel
from eke.testing.ranks import run_alone

AFTER_STEPS = 6  # of 12: in the middle of the second epoch


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
    first: Callable[[], object],
    second: Callable[[], object],
    model: type[TinyModel] = TinyBlocks,
    random: bool = True,
    **options: Any,
) -> str | None:
    """Train with both, killed and resumed in mid-epoch, in both list orders.

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
    options = {"loader": shuffled, **options}
    orders = {
        "first, second": lambda: [first(), second()],
        "second, first": lambda: [second(), first()],
    }
    refusals = {
        order: run_alone(lambda build=build: _refusal(model, build, options)) for order, build in orders.items()
    }
    one, other = refusals.values()
    if one or other:
        refused = [order for order, words in refusals.items() if words]
        assert len(refused) == 2, f"refused in one order only: {refusals}"
        assert len(one) >= 20, f"a refusal has to say why; it said {one!r}"
        return one
    ends = {}
    for order, build in orders.items():
        unbroken, resumed = run.resume(lambda seed: model(seed=seed), build, after_steps=AFTER_STEPS, **options)
        left = list(resumed["steps"])
        pair = [comparable(state, random, left) for state in (unbroken, resumed)]
        assert_same(*pair, f"with callbacks in the order {order}: unbroken run, then resumed one")
        ends[order] = unbroken
    assert_same(*ends.values(), "the order first, second; then the order second, first")
    return None


def _refusal(model: type[TinyModel], build: Callable[[], list[object]], options: dict[str, Any]) -> str | None:
    try:
        run.fit(model(), *build(), **options)
    except REFUSALS as error:
        return str(error)
    return None
