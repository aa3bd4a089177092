"""Tells the eke registry of the second technique in this distribution."""

from eke import Technique, hookimpl

RECORD = Technique(
    name="data_pruning",
    kind="callback",
    factory="eke_data_scores:Pruned",
    paper="https://arxiv.org/abs/2107.07075",
    does="Data pruning: trains on the part of the data that a file of scores chooses",
    topics=("importance sampling",),
    survey=("data-diet", "proto-prune"),
    effects=("replaces samples",),
    needs=("sized training data",),
    exactness="model-changing",
)
EXAMPLE = {"file": "scores.npz"}
MODELS = ()  # of the kit's: there is no such file of their data


@hookimpl
def eke_technique() -> Technique:
    return RECORD
