"""Parameter-efficient fine-tuning."""

from eke.quiet import importing

with importing():  # peft imports torchao
    import peft  # noqa: F401

from eke_peft.base import fingerprint
from eke_peft.callback import PEFT
from eke_peft.errors import PEFTError
from eke_peft.methods import METHODS
from eke_peft.saved import export, load_adapter, merge, set_adapter

__all__ = ["METHODS", "PEFT", "PEFTError", "export", "fingerprint", "load_adapter", "merge", "set_adapter"]
