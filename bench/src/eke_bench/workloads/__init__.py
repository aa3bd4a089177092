"""The workloads by name. Their modules load when they are asked for: images need a package that texts do not."""

from __future__ import annotations

from importlib import import_module

from eke.spec import EkeError

from eke_bench.workloads.base import Learner, Size, Workload, lr_factor

__all__ = ["NAMES", "Learner", "Size", "Workload", "load", "lr_factor"]

NAMES = {
    "gpt": "eke_bench.workloads.gpt:GPT",
    "gpt-long": "eke_bench.workloads.gpt:LongGPT",
    "finetune": "eke_bench.workloads.finetune:Finetune",
    "mae": "eke_bench.workloads.mae:Masked",
    "vit": "eke_bench.workloads.vit:Digits",
    "vit-fine": "eke_bench.workloads.vit:FineDigits",
    "vit-noisy": "eke_bench.workloads.vit:NoisyDigits",
}


def load(name: str, size: str) -> Workload:
    """A workload by its short name, or ``package.module:Class`` for a person's own.

    Raises:
        EkeError: there is none of this name, or it does not load.
        ValueError: it has no such size.
    """
    path = NAMES.get(name, name)
    module, _, attribute = path.partition(":")
    if not attribute:
        raise EkeError(
            f"no workload {name!r}. There are: {', '.join(NAMES)}. Or give your own as package.module:Class."
        )
    try:
        found = getattr(import_module(module), attribute)
    except ImportError as error:
        raise EkeError(f"the workload {name!r} does not load: {error}.") from error
    except AttributeError:
        raise EkeError(f"{module} holds no {attribute!r}.") from None
    return found(size)
