"""Tells the eke registry what this distribution provides."""

from eke import Technique, hookimpl

RECORD = Technique(
    name="stacking",
    kind="callback",
    factory="eke_stacking:Stacking",
    paper="https://proceedings.mlr.press/v97/gong19a.html",
    survey="2.1 Incremental learning, [30]",
    effects=("replaces module tree", "changes weights", "changes optimizer state"),
    exactness="model-changing",
)


@hookimpl
def eke_technique() -> Technique:
    return RECORD
