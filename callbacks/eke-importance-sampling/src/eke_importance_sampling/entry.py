"""Tells the eke registry what this distribution provides."""

from eke import Technique, hookimpl


def _exactness(keep: float = 1 / 3) -> str:
    return "exact" if keep == 1 else "unbiased"


RECORD = Technique(
    name="importance_sampling",
    kind="callback",
    factory="eke_importance_sampling:ImportanceSampling",
    paper="https://arxiv.org/abs/1803.00942",
    does="Importance sampling by gradient norms within each batch, re-weighted so that the gradient stays unbiased",
    topics=("importance sampling",),
    survey=("is-upper-bound",),
    effects=("replaces batch subset", "replaces loss"),
    needs=("automatic optimization",),  # its scoring pass runs training_step without a step
    exactness=_exactness,
    exceptions={
        "test_accumulated_gradients_equal_the_big_batch": "Samples are drawn within each batch, and two small batches "
        "draw others than a large one.",
        "test_two_processes_equal_one": "Each process draws within its own part of a batch.",
    },
)


@hookimpl
def eke_technique() -> Technique:
    return RECORD
