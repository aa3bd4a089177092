"""Rematerialization: blocks of a Transformer are computed again in backward instead of kept."""

from eke_remat.callback import Remat
from eke_remat.policies import POLICIES, Keep

__all__ = ["POLICIES", "Keep", "Remat"]
