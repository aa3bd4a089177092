"""Tells the eke registry what this distribution provides."""

from eke import Technique, hookimpl

RECORD = Technique(
    name="importance_sampling",
    kind="callback",
    factory="eke_importance_sampling:ImportanceSampling",
    paper="https://arxiv.org/abs/1803.00942",
    does="Importance sampling by gradient norms within each batch, re-weighted so that the gradient stays unbiased",
    topics=("importance sampling",),
    survey=("is-upper-bound",),
    effects=("replaces batch subset", "replaces loss"),
    needs=("automatic optimization",),  # a batch is scored by a training_step that must not step
    exactness="unbiased",
    exceptions={
        "test_accumulated_gradients_equal_the_big_batch": "Samples are drawn within each batch, and two small batches "
        "draw others than a large one.",
        "test_two_processes_equal_one": "Each process draws within its own part of a batch.",
    },
)


@hookimpl
def eke_technique() -> Technique:
    return RECORD
