"""Who trains: Lightning with Eke's techniques, and others to hold them against, one small adapter each."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Protocol

from eke.spec import EkeError

from eke_bench.meter import Meter
from eke_bench.store import Run
from eke_bench.workloads import Workload

__all__ = ["NAMES", "Missing", "Subject", "load"]

# Name to its class, and the packages without which there is a hole in the table.
NAMES: dict[str, tuple[str, tuple[str, ...]]] = {
    "lightning": ("eke_bench.subjects.lightning:Lightning", ()),
    "hand": ("eke_bench.subjects.hand:Hand", ()),
    "bitsandbytes": ("eke_bench.subjects.bitsandbytes:BitsAndBytes", ("bitsandbytes",)),
    "deepspeed": ("eke_bench.subjects.deepspeed:DeepSpeed", ("deepspeed",)),
    "hf": ("eke_bench.subjects.hf:HuggingFace", ("transformers", "accelerate")),
    "peft": ("eke_bench.subjects.peft:Peft", ("peft",)),
}


class Missing(EkeError):
    """A subject cannot run on this machine."""


class Subject(Protocol):
    """One way of training a workload."""

    def fit(self, run: Run, workload: Workload, meter: Meter) -> dict[str, float]:
        """Train as ``run`` says, telling ``meter``: start, each step, each evaluation, stop.

        Returns:
            The final held-out measures.
        """


def missing(name: str) -> str | None:
    """Why a subject cannot run here; None if it can."""
    absent = [package for package in NAMES[name][1] if find_spec(package) is None]
    return f"{absent[0]} is not installed" if absent else None


def load(name: str) -> Subject:
    """A subject by name.

    Raises:
        EkeError: there is none of this name.
        Missing: its package is not installed, or does not load here.
    """
    if name not in NAMES:
        raise EkeError(f"no subject {name!r}. There are: {', '.join(NAMES)}.")
    if why := missing(name):
        raise Missing(f"{name} is not available here: {why}.")
    module, _, attribute = NAMES[name][0].partition(":")
    try:
        return getattr(import_module(module), attribute)()
    except ImportError as error:
        raise Missing(f"{name} is not available here: {error}.") from error
