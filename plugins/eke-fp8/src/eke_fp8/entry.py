"""Tells the eke registry what this distribution provides."""

from eke import Technique, hookimpl

_SCALES = "A batch in two parts has other scales than the whole, and so another rounding."

RECORD = Technique(
    name="fp8",
    kind="plugin",
    factory="eke_fp8:FP8",
    paper="https://arxiv.org/abs/2209.05433",
    does="FP8 training of linear layers: Transformer Engine, torchao float8, or an exact emulation",
    topics=("quantized training",),
    survey=("fp8", "s2fp8"),
    effects=("changes precision",),
    exactness="approximate",
    exceptions={
        "test_accumulated_gradients_equal_the_big_batch": _SCALES,
        "test_it_costs_nothing_when_it_has_nothing_to_do": "There is no step in which it has nothing to do.",
        "test_two_processes_equal_one": _SCALES,
    },
)

TRY = {  # in random runs
    "recipe": ("tensorwise", "rowwise", "rowwise_with_gw_hp", "delayed", "block", "mx", "s2fp8", "chunked"),
    "layers": (["*fc*|*linear*"],),
}


@hookimpl
def eke_technique() -> Technique:
    return RECORD
