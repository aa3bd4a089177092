"""Tells the eke registry what this distribution provides."""

from eke import Technique, hookimpl

RECORD = Technique(
    name="zero",
    kind="strategy",
    factory="eke_zero:ZeRO",
    paper="https://arxiv.org/abs/1910.02054",
    survey="3 Parallelism [73], 3.2 Offloading [75]",
    effects=("replaces sharding",),
    exactness="reordered sums",
)


@hookimpl
def eke_technique() -> Technique:
    return RECORD
