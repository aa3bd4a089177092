"""Tells the eke registry what this distribution provides."""

from eke import Technique, hookimpl

_TOKENS = "both choose tokens of one sequence: what is merged is no longer in its place"

RECORD = Technique(
    name="token_merge",
    kind="callback",
    factory="eke_token_merge:TokenMerge",
    paper="https://arxiv.org/abs/2210.09461",
    survey="2.2 Data selection, token masking",
    effects=("changes activations",),
    conflicts={"random_ltd": _TOKENS, "token_drop": _TOKENS},
    exactness="model-changing",
    exceptions={
        "test_under_torch_compile_it_reaches_the_same_weights": "Which tokens are merged is found outside of "
        "compiled code, and a compiled model is refused with that reason.",
    },
)

MODELS = ("TinyViT",)  # of the kit's


@hookimpl
def eke_technique() -> Technique:
    return RECORD
