"""Tells the eke registry what this distribution provides."""

from eke import Technique, hookimpl


def _exactness(keep: float = 0.5) -> str:
    return "exact" if keep == 1 else "model-changing"


RECORD = Technique(
    name="selective_backprop",
    kind="callback",
    factory="eke_selective_backprop:SelectiveBackprop",
    paper="https://arxiv.org/abs/1910.00762",
    does="Selective backprop: trains on the samples of a batch whose loss is high",
    topics=("importance sampling",),
    effects=("replaces batch subset", "keeps loss"),
    needs=("automatic optimization",),  # its scoring pass runs training_step without a step
    exactness=_exactness,
    exceptions={
        "test_accumulated_gradients_equal_the_big_batch": "Samples are chosen within each batch, and two small batches "
        "choose others than a large one.",
        "test_two_processes_equal_one": "Each process chooses within its own part of a batch.",
    },
)


@hookimpl
def eke_technique() -> Technique:
    return RECORD
