"""Tells the eke registry what this distribution provides."""

from eke import Technique, hookimpl

RECORD = Technique(
    name="data_scores",
    kind="callback",
    factory="eke_data_scores:Score",
    paper="https://arxiv.org/abs/2107.07075",
    does="Scores every training sample into a file: EL2N, forgetting or loss, for data pruning",
    topics=("importance sampling",),
    survey=("data-diet",),
    effects=("reads samples", "reads loss", "keeps batch subset"),
    needs=("sized training data",),
)
EXAMPLE = {"file": "scores.npz"}
MODELS = ()  # of the kit's: each run would find the file of the one before


@hookimpl
def eke_technique() -> Technique:
    return RECORD
