"""Tells the eke registry what this distribution provides."""

from eke import Technique, hookimpl

RECORD = Technique(
    name="report",
    kind="callback",
    factory="eke_report:Report",
    paper="https://arxiv.org/abs/2302.01107",
    survey="6 Conclusion: a standard way of measuring",
    effects=("reads activations", "reads gradients", "reads optimizer state"),
    exactness="exact",
)


@hookimpl
def eke_technique() -> Technique:
    return RECORD
