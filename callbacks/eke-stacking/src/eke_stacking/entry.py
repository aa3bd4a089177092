"""Tells the eke registry what this distribution provides."""

from eke import Technique, hookimpl

RECORD = Technique(
    name="stacking",
    kind="callback",
    factory="eke_stacking:Stacking",
    paper="https://proceedings.mlr.press/v97/gong19a.html",
    does="Progressive stacking: trains some of a Transformer's blocks first, copies them upward, goes on with all",
    topics=("incremental learning",),
    survey=("stacking",),
    effects=("replaces module tree", "changes weights", "changes optimizer state"),
    intolerance=(
        "The model changes its shape in mid-run, which such a strategy cannot follow. Use one device or "
        "strategy='ddp', or save a checkpoint at the growth and start a new fit from it."
    ),
    exactness="model-changing",
)


@hookimpl
def eke_technique() -> Technique:
    return RECORD
