"""Tells the eke registry what this distribution provides."""

from eke import Technique, hookimpl


def _exactness(count: int = 8) -> str:
    return "exact" if count == 0 else "model-changing"


RECORD = Technique(
    name="token_merge",
    kind="callback",
    factory="eke_token_merge:TokenMerge",
    paper="https://arxiv.org/abs/2210.09461",
    does="Token merging (ToMe) while training: each block of a ViT joins the tokens that are most alike",
    topics=("token masking",),
    # Attention is watched in forward alone: a block that is computed again in backward would merge other tokens.
    effects=("changes attention", "changes tokens", "keeps tokens", "changes hidden states", "keeps saved tensors"),
    tolerates=("awaited blocks",),
    exactness=_exactness,
    exceptions={
        "test_under_torch_compile_it_reaches_the_same_weights": "Which tokens are merged is found outside of "
        "compiled code, and a compiled model is refused with that reason.",
    },
)

MODELS = ("TinyViT",)  # of the kit's


@hookimpl
def eke_technique() -> Technique:
    return RECORD
