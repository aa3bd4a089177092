"""Which pairs of tokens meet: fixed by place or by document, or predicted, one file each."""

from eke_attention.patterns.a3 import A3, greedy_scores
from eke_attention.patterns.base import Pattern, Predicted, may_meet, pairs, quantize, recall
from eke_attention.patterns.documents import Documents, pack
from eke_attention.patterns.dota import DOTA
from eke_attention.patterns.elsa import ELSA
from eke_attention.patterns.prefix import Prefix
from eke_attention.patterns.sanger import Sanger
from eke_attention.patterns.vitcod import ViTCoD, covering, polarize
from eke_attention.patterns.window import SlidingWindow

__all__ = [
    "A3", "DOTA", "ELSA", "Documents", "Pattern", "Predicted", "Prefix", "Sanger", "SlidingWindow", "ViTCoD",
    "covering", "greedy_scores", "may_meet", "pack", "pairs", "polarize", "quantize", "recall",
]  # fmt: skip
