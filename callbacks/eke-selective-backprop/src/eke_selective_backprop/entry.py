"""Tells the eke registry what this distribution provides."""

from eke import Technique, hookimpl

RECORD = Technique(
    name="selective_backprop",
    kind="callback",
    factory="eke_selective_backprop:SelectiveBackprop",
    paper="https://arxiv.org/abs/1910.00762",
    survey="2.2 Importance sampling",
    effects=("replaces batch", "replaces loss"),
    exactness="model-changing",
    conflicts={
        "rais": "it needs the gradient norm of every sample of a batch, and only some of them are trained on.",
        "infobatch": "it weighs the samples of an epoch that this one would choose again within each batch.",
        "data_scores": "it needs the loss of every sample of a batch, and only some of them are trained on.",
    },
    exceptions={
        "test_accumulated_gradients_equal_the_big_batch": "Samples are chosen within each batch, and two small batches "
        "choose others than a large one.",
        "test_two_processes_equal_one": "Each process chooses within its own part of a batch.",
    },
)


@hookimpl
def eke_technique() -> Technique:
    return RECORD
