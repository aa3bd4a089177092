"""Tells the eke registry what this distribution provides."""

from __future__ import annotations

from eke import Offer, Technique, hookimpl


def _imposes(stage: int = 3, engine: str = "torch", checkpoint: str | None = None) -> tuple[str, ...]:
    if engine == "deepspeed":
        return (*("sharded optimizer", "sharded gradients", "sharded parameters")[:stage], "own optimizer")
    if stage == 1:
        return ("sharded optimizer",)
    # FSDP2 keeps the weights of stage 2 sharded between steps too.
    sharded = ("sharded optimizer", "sharded gradients", "sharded parameters")
    return sharded if checkpoint == "sharded" else (*sharded, "gathered states")


RECORD = Technique(
    name="zero",
    kind="strategy",
    factory="eke_zero:ZeRO",
    paper="https://arxiv.org/abs/1910.02054",
    does="ZeRO stages 1 to 3: optimizer states, gradients and weights sharded, on torch or DeepSpeed",
    topics=("parallelism", "rematerialization and offloading"),
    survey=("zero", "zero-offload", "act-ckpt"),
    effects=("replaces batch sharding", "replaces parameter sharding", "replaces optimizer sharding"),
    imposes=_imposes,
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
