"""What Eke knows of this technique without importing torch."""

from eke import Technique, hookimpl

RECORD = Technique(
    name="adam8bit",
    kind="plugin",
    factory="eke_adam8bit:Adam8bit",
    paper="https://arxiv.org/abs/2110.02861",
    survey="3 Memory efficiency; the paper is not in the survey's list",
    effects=("replaces optimizer", "changes optimizer state"),
    exactness="approximate",
)


@hookimpl
def eke_technique() -> Technique:
    return RECORD
