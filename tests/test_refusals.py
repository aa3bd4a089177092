"""Every refusal of Eke is an ``eke.EkeError``, whatever else it is caught as."""

import ast
import builtins
import importlib
from pathlib import Path

import eke
import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

REPO = Path(__file__).parents[1]
SOURCES = sorted(
    file
    for pattern in ("core/src", "core/*/src", "callbacks/*/src", "plugins/*/src", "strategies/*/src", "bench/src")
    for folder in REPO.glob(pattern)
    for file in folder.rglob("*.py")
)
# What Python, torch and pytest expect to get: of a module without an attribute, a method that a subclass has to write,
# a test that has failed, an iterator at its end.
PROTOCOL = {"AttributeError", "NotImplementedError", "AssertionError", "StopIteration", "SystemExit", "ImportError"}


def plain(file):
    """Lines that raise one of Python's own exceptions, or Lightning's."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        raised = node.exc if isinstance(node, ast.Raise) else None
        call = raised.func if isinstance(raised, ast.Call) else raised
        name = call.id if isinstance(call, ast.Name) else ""
        known = getattr(builtins, name, None) if name else None
        own = isinstance(known, type) and issubclass(known, Exception) and name not in PROTOCOL
        if own or name == "MisconfigurationException":
            yield f"{file.relative_to(REPO)}:{node.lineno}: {name}"


# Raised and caught in one module, and the mistakes of an author at a seam.
ALLOWED = {
    "bench/src/eke_bench/store.py": "caught there",
    "callbacks/eke-mae/src/eke_mae/callback.py": "caught there, and told as MAEError",
    "core/src/eke/cli/certificates.py": "caught there",
    "core/src/eke/seams/interceptor.py": "an owner that is not attached",
    "core/src/eke/seams/swap.py": "a name that is no tensor of the module",
}


def test_no_refusal_is_one_of_pythons_own_exceptions():
    found = [line for file in SOURCES for line in plain(file)]
    assert [line for line in found if line.partition(":")[0] not in ALLOWED] == []
    assert {line.partition(":")[0] for line in found} == set(ALLOWED)


def test_an_argument_and_a_run_that_are_refused_are_caught_as_before_too():
    for other in (eke.EkeError, ValueError):
        assert issubclass(eke.ArgumentError, other)
        assert issubclass(eke.RunError, other)
    assert issubclass(eke.RunError, MisconfigurationException)


@pytest.mark.parametrize(
    ("place", "arguments"),
    [("eke_layer_drop:LayerDrop", {"keep": 2.0}), ("eke_stacking:Stacking", {"stages": [0.5, 0.2]}),
     ("eke_token_merge:TokenMerge", {"count": -1}), ("eke_fp8:FP8", {"recipe": "none"})],
)  # fmt: skip
def test_a_wrong_argument_is_one(place, arguments):
    module, _, name = place.partition(":")
    with pytest.raises(eke.EkeError) as refused:
        getattr(importlib.import_module(module), name)(**arguments)
    assert isinstance(refused.value, ValueError)
