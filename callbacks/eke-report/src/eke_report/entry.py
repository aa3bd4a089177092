"""Tells the eke registry what this distribution provides."""

from eke import Technique, hookimpl

RECORD = Technique(
    name="report",
    kind="callback",
    factory="eke_report:Report",
    paper="https://arxiv.org/abs/2302.01107",
    does="Reports what each technique of a run gives in step time and memory, and how busy the machine is",
    topics=("future directions",),
    effects=("reads saved tensors", "reads gradients", "reads optimizer state"),
    tolerates=("sharded optimizer", "sharded gradients", "sharded parameters", "gathered states", "own optimizer"),
    exactness="exact",
)


@hookimpl
def eke_technique() -> Technique:
    return RECORD
