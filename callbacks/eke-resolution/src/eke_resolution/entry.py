"""Tells the eke registry what this distribution provides."""

from eke import Technique, hookimpl


def _exactness(start: float = 0.5) -> str:
    return "exact" if start == 1 else "model-changing"


RECORD = Technique(
    name="resolution",
    kind="callback",
    factory="eke_resolution:Resolution",
    paper="https://arxiv.org/abs/2212.08013",
    does="Progressive resolution and patch size: a ViT begins with small images, or with large patches",
    topics=("incremental learning",),
    survey=("progressive-res",),
    effects=("changes batch content", "changes hidden states"),
    tolerates=("awaited blocks",),
    exactness=_exactness,
)

MODELS = ("TinyViT",)  # of the kit's


@hookimpl
def eke_technique() -> Technique:
    return RECORD
