"""What Eke knows of this technique without importing torch."""

from eke import Offer, Technique, hookimpl

RECORD = Technique(
    name="adam8bit",
    kind="plugin",
    factory="eke_adam8bit:Adam8bit",
    paper="https://arxiv.org/abs/2110.02861",
    survey="3 Memory efficiency; the paper is not in the survey's list",
    effects=("replaces optimizer", "changes optimizer state"),
    exactness="approximate",
    offers=(Offer("rounding"),),
    exceptions={
        "test_its_checkpoint_loads_without_it_or_says_why_not": (
            "its weights load anywhere, but a Trainer without Eke meets optimizer states that AdamW does not know and "
            "stops with a KeyError at the first step; AdamW8bit.state_dict_32bit() gives states that AdamW loads"
        ),
    },
)


@hookimpl
def eke_technique() -> Technique:
    return RECORD
