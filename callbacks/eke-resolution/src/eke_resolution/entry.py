"""Tells the eke registry what this distribution provides."""

from eke import Technique, hookimpl

RECORD = Technique(
    name="resolution",
    kind="callback",
    factory="eke_resolution:Resolution",
    paper="https://arxiv.org/abs/2212.08013",
    survey="2.1 Incremental learning",
    effects=("changes activations",),
    exactness="model-changing",
)

MODELS = ("TinyViT",)  # of the kit's


@hookimpl
def eke_technique() -> Technique:
    return RECORD
