"""The contract kit: what every technique promises, as tests that anyone's technique inherits.

Three lines in a test file run all of it::

    from eke.testing import TechniqueContract

    class TestContract(TechniqueContract):
        def build(self):
            return MyTechnique()

Names are loaded on first use, because pytest imports this package (for ``--certify``) in every run.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eke.testing.compare import assert_same, differences
    from eke.testing.contract import CallbackContract, TechniqueContract, ZooContract
    from eke.testing.data import BATCH, LENGTH, Images, Loader, Tokens, shuffled
    from eke.testing.models import LAYERS, SHAPES, WIDTH, TinyBlocks, TinyGPT2, TinyTransformer, TinyViT, hugging_face
    from eke.testing.pairs import build_example, check_pair, check_together, example_model
    from eke.testing.ranks import RankError, run_alone, run_ranks
    from eke.testing.run import Cut, Run, fit, resume

__all__ = [
    "BATCH",
    "CallbackContract",
    "Cut",
    "Images",
    "LAYERS",
    "LENGTH",
    "Loader",
    "RankError",
    "Run",
    "SHAPES",
    "TechniqueContract",
    "TinyBlocks",
    "TinyGPT2",
    "TinyTransformer",
    "TinyViT",
    "Tokens",
    "WIDTH",
    "ZooContract",
    "assert_same",
    "build_example",
    "check_pair",
    "check_together",
    "differences",
    "example_model",
    "fit",
    "hugging_face",
    "resume",
    "run_alone",
    "run_ranks",
    "shuffled",
]

_HOME = {
    "compare": ["assert_same", "differences"],
    "contract": ["CallbackContract", "TechniqueContract", "ZooContract"],
    "data": ["BATCH", "LENGTH", "Images", "Loader", "Tokens", "shuffled"],
    "models": ["LAYERS", "SHAPES", "WIDTH", "TinyBlocks", "TinyGPT2", "TinyTransformer", "TinyViT", "hugging_face"],
    "pairs": ["build_example", "check_pair", "check_together", "example_model"],
    "ranks": ["RankError", "run_alone", "run_ranks"],
    "run": ["Cut", "Run", "fit", "resume"],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f"eke.testing.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'eke.testing' has no attribute {name!r}")
