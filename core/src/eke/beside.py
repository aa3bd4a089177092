"""Lightning's own callbacks that reach into a run past Eke's order: what they do, and which techniques cannot bear it.

Data only, by the names of classes: imports neither torch nor lightning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from eke.spec import ConflictError, Technique


@dataclass(frozen=True)
class Callback:
    """A callback of Lightning's.

    Args:
        name: Of its class. Subclasses are meant too.
        effects: As in a technique's record.
        refuses: Resource to the reason why a technique that replaces or changes it cannot run beside the callback.
        instead: What to do.
        note: What a user should know of it without any technique.
    """

    name: str
    effects: tuple[str, ...]
    refuses: Mapping[str, str] = field(default_factory=dict)
    instead: str = ""
    note: str = ""


_COPIES = (
    "it copies the module when the run opens and pairs its weights with the copy's, so that modules that are put in, "
    "taken out or grow are in one of them alone"
)

CALLBACKS = (
    Callback(
        "WeightAveraging",
        ("reads weights", "replaces weights-at-eval"),
        {
            "module tree": _COPIES,
            "weights-at-eval": "both put other weights in place for validation and for saved models",
            "sharding": "it copies the module before it is sharded",
        },
        "Leave it out, or average by a technique of Eke's, which follows growth and shards.",
    ),
    Callback(
        "StochasticWeightAveraging",
        ("changes weights", "replaces learning rate", "replaces weights-at-eval"),
        {
            "module tree": _COPIES,
            "weights-at-eval": "both put other weights in place at the end",
            "learning rate": "it puts a schedule of its own in the place of all others in mid-run",
            "samples": "it counts epochs and batches of its own, and the lengths of epochs change",
            "sharding": "it copies the module before it is sharded",
        },
        "Leave it out, or average by a technique of Eke's, which follows growth and shards.",
        "a run that resumes was seen to end at other weights than an unbroken one.",
    ),
    Callback(
        "BaseFinetuning",
        ("replaces requires_grad", "changes optimizer", "changes learning rate"),
        {
            "module tree": "it freezes modules when the run opens and adds groups to the optimizer in mid-run, which "
            "do not follow modules that are put in or grow",
            "requires_grad": "both decide which weights train",
            "sharding": "the groups that it adds hold parameters as they were before sharding",
        },
        "Leave it out, or freeze by what configure_optimizers gives to the optimizer.",
        "after a resume, what it has unfrozen is frozen again: a fault of Lightning's (issue 21901).",
    ),
    Callback(
        "ModelPruning",
        ("changes module tree", "changes weights"),
        {
            "module tree": "it gives weights other names (weight_orig) in mid-run",
            "weights": "both decide what weights are after a step",
            "sharding": "it gives parameters other names in mid-run",
        },
        "Leave it out, or prune by a technique that claims masks of Eke's.",
    ),
)


def refusals(callbacks: Iterable[object], records: Iterable[Technique]) -> list[str]:
    """Name every technique that cannot run beside a callback, a sentence each; empty where all can.

    Args:
        callbacks: Of the Trainer. Those that are not Lightning's, nor made from them, are passed over.
        records: Of the run's techniques, strategy and precision.
    """
    records = list(records)
    found = []
    for callback in callbacks:
        own = known(callback)
        for record in records if own is not None else ():
            touched = record.touches("replaces") | record.touches("changes")
            reasons = [reason for resource, reason in own.refuses.items() if resource in touched]
            if reasons:
                found.append(
                    f"{record.name!r} cannot run beside Lightning's {type(callback).__name__}: {reasons[0]}. "
                    f"{own.instead}"
                )
    return found


def check(callbacks: Iterable[object], records: Iterable[Technique]) -> None:
    """Refuse what :func:`refusals` names, at the start of a run.

    Raises:
        ConflictError: with all of the reasons.
    """
    if found := refusals(callbacks, records):
        raise ConflictError(" ".join(found))


def notes(callbacks: Iterable[object]) -> list[str]:
    """What a user should know of the callbacks themselves, a sentence each."""
    return [
        f"Lightning's {type(callback).__name__}: {own.note}"
        for callback in callbacks
        if (own := known(callback)) is not None and own.note
    ]


def known(callback: object) -> Callback | None:
    """What is known of a callback, by its class or what that was made from."""
    for cls in type(callback).__mro__:
        if cls.__module__.partition(".")[0] in ("lightning", "pytorch_lightning"):
            for one in CALLBACKS:
                if one.name == cls.__name__:
                    return one
    return None
