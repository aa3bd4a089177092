"""Tells the eke registry what this distribution provides."""

from eke import Technique, hookimpl


def _exactness(pattern: object = None) -> str:
    return "reordered sums" if pattern is None else "model-changing"  # without one, all pairs meet as before


RECORD = Technique(
    name="attention",
    kind="plugin",
    factory="eke_attention:Attention",
    paper="https://arxiv.org/abs/2205.14135",
    does="Attention by another kernel or on fewer pairs: SDPA, FlexAttention, windows, predicted sparsity",
    topics=("efficient attention", "hardware-aware low precision", "sparse matrix multiplication"),
    survey=("flash-attn", "a3", "elsa", "sanger", "dota", "vitcod"),
    effects=("changes attention",),
    exactness=_exactness,
)


@hookimpl
def eke_technique() -> Technique:
    return RECORD
