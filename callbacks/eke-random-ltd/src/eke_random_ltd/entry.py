"""Tells the eke registry what this distribution provides."""

from eke import Technique, hookimpl

RECORD = Technique(
    name="random_ltd",
    kind="callback",
    factory="eke_random_ltd:RandomLTD",
    paper="https://arxiv.org/abs/2211.11586",
    survey="2.2 Data selection, token masking",
    effects=("changes activations",),
    exactness="model-changing",
    exceptions={
        "test_accumulated_gradients_equal_the_big_batch": "Each micro-batch draws the tokens of its own samples, so "
        "two of them draw others than one batch of twice the size.",
        "test_two_processes_equal_one": "Each process draws the tokens of its own samples, so two of them draw others "
        "than one process does.",
    },
)


@hookimpl
def eke_technique() -> Technique:
    return RECORD
