"""Tells the eke registry what this distribution provides."""

from eke import Offer, Technique, hookimpl

RECORD = Technique(
    name="zero",
    kind="strategy",
    factory="eke_zero:ZeRO",
    paper="https://arxiv.org/abs/1910.02054",
    survey="3 Parallelism [73], 3.2 Offloading [75]",
    effects=("replaces sharding",),
    exactness="reordered sums",
    offers=(
        Offer("communication", {"stage": 1}, ranks=2),
        Offer("communication", {"stage": 2}, ranks=2),
        Offer("communication", {"stage": 3}, ranks=2),
        Offer("recomputing", {"remat": True}),
        Offer("transfers", {"offload": "optimizer"}),
        Offer("transfers", {"stage": 3, "offload": "params"}),
    ),
)


@hookimpl
def eke_technique() -> Technique:
    return RECORD
