"""Tells the eke registry what this distribution provides."""

from eke import Technique, hookimpl


def _exactness(ratio: float = 0.5) -> str:
    return "exact" if ratio == 0 else "unbiased"


RECORD = Technique(
    name="infobatch",
    kind="callback",
    factory="eke_infobatch:InfoBatch",
    paper="https://arxiv.org/abs/2303.04947",
    does="InfoBatch: leaves out learned samples, re-weights so that the gradient stays unbiased",
    topics=("importance sampling",),
    effects=("replaces samples", "keeps batch subset", "changes loss", "changes learning rate"),
    needs=("sized training data",),
    exactness=_exactness,
    exceptions={
        "test_accumulated_gradients_equal_the_big_batch": "Epochs that leave samples out end in a batch of "
        "another size, and so do accumulated windows.",
        "test_two_processes_equal_one": "Under several processes it deals the samples out itself, in an order that one "
        "process does not have.",
    },
)


@hookimpl
def eke_technique() -> Technique:
    return RECORD
