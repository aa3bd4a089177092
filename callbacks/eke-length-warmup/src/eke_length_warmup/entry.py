"""Tells the eke registry what this distribution provides."""

from eke import Technique, hookimpl

RECORD = Technique(
    name="length_warmup",
    kind="callback",
    factory="eke_length_warmup:LengthWarmup",
    paper="https://arxiv.org/abs/2108.06084",
    survey="2.1 Incremental learning",
    effects=("changes batch",),
    exactness="model-changing",
)

MODELS = ("TinyBlocks", "TinyTransformer", "TinyGPT2")  # of the kit's


@hookimpl
def eke_technique() -> Technique:
    return RECORD
