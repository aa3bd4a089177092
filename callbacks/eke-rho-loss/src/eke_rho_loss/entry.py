"""Tells the eke registry what this distribution provides."""

from eke import Technique, hookimpl


def _exactness(keep: float = 0.1) -> str:
    return "exact" if keep == 1 else "model-changing"


RECORD = Technique(
    name="rho_loss",
    kind="callback",
    factory="eke_rho_loss:RhoLoss",
    paper="https://arxiv.org/abs/2206.07137",
    does="RHO-LOSS: trains on samples whose loss is high and would be low for a model that has not seen them",
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
EXAMPLE = {"file": "zero"}


@hookimpl
def eke_technique() -> Technique:
    return RECORD
