"""Tells the eke registry what this distribution provides."""

from eke import Technique, hookimpl

RECORD = Technique(
    name="attention",
    kind="plugin",
    factory="eke_attention:Attention",
    paper="https://arxiv.org/abs/2205.14135",
    survey="4 Hardware/algorithm co-design: efficient attention",
    effects=("changes attention",),
    exactness="model-changing",  # with a pattern; without one sums are reordered
)


@hookimpl
def eke_technique() -> Technique:
    return RECORD
