"""Parameter-efficient fine-tuning."""

from eke_peft.callback import PEFT, PEFTError
from eke_peft.methods import METHODS, fingerprint
from eke_peft.saved import export, load_adapter, merge, set_adapter

__all__ = ["METHODS", "PEFT", "PEFTError", "export", "fingerprint", "load_adapter", "merge", "set_adapter"]
