"""Tells the eke registry what this distribution provides."""

from eke import Offer, Technique, hookimpl

RECORD = Technique(
    name="remat",
    kind="callback",
    factory="eke_remat:Remat",
    paper="https://arxiv.org/abs/1604.06174",
    does="Rematerialization: blocks are computed again in backward instead of kept; all, some, in spans or by operator",
    topics=("rematerialization and offloading",),
    survey=("act-ckpt",),
    effects=("replaces saved tensors",),
    exceptions={
        "test_it_costs_nothing_when_it_has_nothing_to_do": "There is no step in which it has nothing to do: each one "
        "computes blocks again.",
    },
    offers=(
        Offer("recomputing", {"every": 2}),
        Offer("recomputing", {"policy": "matmuls"}),
        Offer("recomputing", {}),
    ),
)


@hookimpl
def eke_technique() -> Technique:
    return RECORD
