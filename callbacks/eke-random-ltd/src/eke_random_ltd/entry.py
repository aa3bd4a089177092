"""Tells the eke registry what this distribution provides."""

from eke import Technique, hookimpl


def _exactness(start: float = 0.25) -> str:
    return "exact" if start == 1.0 else "model-changing"


RECORD = Technique(
    name="random_ltd",
    kind="callback",
    factory="eke_random_ltd:RandomLTD",
    paper="https://arxiv.org/abs/2211.11586",
    does="Random layerwise token dropping: middle blocks train on some tokens, the others pass them by",
    topics=("token masking",),
    effects=("changes tokens", "changes hidden states"),
    tolerates=("awaited blocks",),
    exactness=_exactness,
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
