"""What is checked, and on what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from eke import Technique
from eke.testing import run
from eke.testing.models import STEPS, TinyBlocks, TinyModel
from lightning.pytorch import LightningModule


@dataclass(frozen=True)
class Subject:
    """What is checked, and on what.

    Args:
        build: Makes a new technique object.
        model: The kit's model that it is checked on.
        epochs: Epochs of a run.
        steps: Batches in an epoch.
        frozen: Patterns of names of weights that are meant to stay as they are, such as ``"embed.*"``.
        tolerance: Largest absolute difference of a weight where sums may be taken in another order.
        idle: Makes a technique that has nothing to do in a run, where one can be made.
        arguments: Arguments by which a LightningCLI builds it.
        extra_calls: Python calls that it may add to a step in which it has nothing to do.
        options: Trainer arguments of every run.
    """

    build: Callable[[], object]
    model: type[TinyModel] = TinyBlocks
    epochs: int = run.EPOCHS
    steps: int = STEPS
    frozen: tuple[str, ...] = ()
    tolerance: float = 1e-5
    idle: Callable[[], object] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    extra_calls: int = 20
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def record(self) -> Technique | None:
        """The technique's own record, or None for a callback that has none."""
        record = getattr(self.build(), "technique", None)
        return record if isinstance(record, Technique) else None

    def fit(self, model: LightningModule, *techniques: object, **options: Any) -> run.Run:
        return run.fit(model, *techniques, **{"epochs": self.epochs, "steps": self.steps, **self.options, **options})

    @property
    def chooses_samples(self) -> bool:
        """Whether its epochs may have fewer batches than the loader has."""
        record = self.record
        return record is not None and "samples" in record.touches("replaces")

    def touches(self, *resources: str) -> bool:
        """Whether the record says that it replaces or changes one of these. True where there is no record."""
        record = self.record
        return record is None or bool((record.touches("replaces") | record.touches("changes")) & set(resources))
