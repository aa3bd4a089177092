"""Eke out more training from the same hardware: techniques for ``lightning.Trainer`` that combine and resume.

Importing this package imports neither torch nor lightning; what needs them is loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import extend_path
from typing import TYPE_CHECKING, Any

from eke.registry import available, create, get, trainer_kwargs
from eke.spec import (
    ArgumentError,
    ConflictError,
    EkeError,
    NoEffectWarning,
    NoGradientWarning,
    Offer,
    ResumeError,
    Technique,
    hookimpl,
)

if TYPE_CHECKING:
    from eke.refusal import RunError
    from eke.run import Run, in_run
    from eke.seams.losses import reduce_loss
    from eke.technique import TechniqueCallback, TechniqueStrategy, load_from_checkpoint, techniques

# eke-testing and eke-forecast are distributions of their own that bring eke.testing and eke.forecast.
__path__ = extend_path(__path__, __name__)

_LAZY = dict.fromkeys(("TechniqueCallback", "TechniqueStrategy", "load_from_checkpoint", "techniques"), "eke.technique")
_LAZY["reduce_loss"] = "eke.seams.losses"
_LAZY["RunError"] = "eke.refusal"
_LAZY["Run"] = _LAZY["in_run"] = "eke.run"

__all__ = [
    "ArgumentError",
    "ConflictError",
    "EkeError",
    "NoEffectWarning",
    "NoGradientWarning",
    "Offer",
    "ResumeError",
    "Run",
    "RunError",
    "Technique",
    "TechniqueCallback",
    "TechniqueStrategy",
    "available",
    "create",
    "get",
    "hookimpl",
    "in_run",
    "load_from_checkpoint",
    "reduce_loss",
    "techniques",
    "trainer_kwargs",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'eke' has no attribute {name!r}")
