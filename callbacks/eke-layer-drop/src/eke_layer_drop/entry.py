"""Tells the eke registry what this distribution provides."""

from eke import Technique, hookimpl


def _exactness(keep: float = 0.5) -> str:
    return "exact" if keep == 1 else "model-changing"


RECORD = Technique(
    name="layer_drop",
    kind="callback",
    factory="eke_layer_drop:LayerDrop",
    paper="https://arxiv.org/abs/2010.13369",
    does="Layer dropping and stochastic depth: each step skips some blocks, more of the deeper ones",
    topics=("incremental learning",),
    survey=("pld",),
    effects=("changes hidden states",),
    intolerance=(
        "A block that is skipped would leave processes waiting. Use one device, strategy='ddp' or ZeRO of eke-zero,"
        " or leave it out."
    ),
    exactness=_exactness,
    exceptions={
        "test_accumulated_gradients_equal_the_big_batch": "Each micro-batch draws the blocks that it runs, so several "
        "of them see other sub-networks than one big batch does.",
    },
)


@hookimpl
def eke_technique() -> Technique:
    return RECORD
