"""Tells the eke registry what this distribution provides."""

from eke import Technique, hookimpl


def _exactness(drop: float = 0.5) -> str:
    return "exact" if drop == 0 else "model-changing"


RECORD = Technique(
    name="token_drop",
    kind="callback",
    factory="eke_token_drop:TokenDrop",
    paper="https://arxiv.org/abs/2212.00794",
    does="Patch dropout and FLIP: a ViT trains on a random part of its patches, and on all at the end",
    topics=("token masking",),
    survey=("flip",),
    effects=("replaces tokens", "changes hidden states"),
    tolerates=("awaited blocks",),
    exactness=_exactness,
    exceptions={
        "test_accumulated_gradients_equal_the_big_batch": "Each micro-batch draws the patches of its own samples, so "
        "two of them draw others than one batch of twice the size.",
        "test_two_processes_equal_one": "Each process draws the patches of its own samples, so two of them draw others "
        "than one process does.",
    },
)

MODELS = ("TinyViT",)  # of the kit's


@hookimpl
def eke_technique() -> Technique:
    return RECORD
