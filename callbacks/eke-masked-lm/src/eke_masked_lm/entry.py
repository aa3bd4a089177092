"""Tells the eke registry what this distribution provides."""

from eke import Technique, hookimpl

RECORD = Technique(
    name="masked_lm",
    kind="callback",
    factory="eke_masked_lm:MaskedLM",
    paper="https://arxiv.org/abs/1810.04805",
    does="Masked language modelling on the device: tokens, whole words or spans, a sparse head; and MASS",
    topics=("token masking",),
    survey=("mlm", "mass"),
    effects=("changes batch content", "changes hidden states"),
    tolerates=("awaited blocks",),
    exactness="model-changing",
    exceptions={
        "test_accumulated_gradients_equal_the_big_batch": "Each micro-batch draws the masks of its own sequences, so "
        "two of them draw others than one batch of twice the size.",
        "test_two_processes_equal_one": "Each process draws the masks of its own sequences, so two of them draw others "
        "than one process does.",
        "test_it_costs_nothing_when_it_has_nothing_to_do": "There is no step in which it has nothing to do: each batch "
        "gets its masks.",
    },
)

EXAMPLE = {"mask_token": 31, "vocabulary": 32}  # the kit's
MODELS = ("TinyBlocks", "TinyTransformer")


@hookimpl
def eke_technique() -> Technique:
    return RECORD
