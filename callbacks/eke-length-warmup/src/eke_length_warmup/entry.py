"""Tells the eke registry what this distribution provides."""

from eke import Technique, hookimpl

RECORD = Technique(
    name="length_warmup",
    kind="callback",
    factory="eke_length_warmup:LengthWarmup",
    paper="https://arxiv.org/abs/2108.06084",
    does="Sequence-length warm-up: trains on short sequences first and lets them grow to their full length",
    topics=("incremental learning",),
    effects=("changes batch content",),
    exactness="model-changing",
)

MODELS = ("TinyBlocks", "TinyTransformer", "TinyGPT2")  # of the kit's


@hookimpl
def eke_technique() -> Technique:
    return RECORD
