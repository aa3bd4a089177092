"""Selective backprop: a forward pass over each batch, and a training step on the samples with the higher losses.

Source: Jiang, Wong, Zhou and others, "Accelerating Deep Learning by Focusing on the Biggest Losers", 2019,
https://arxiv.org/abs/1910.00762. It has the form that MosaicML Composer gave it: a fixed number of samples is drawn
without replacement from one batch, in a window of the run, and not in every step. The samples are not weighted: the
gradient is biased towards hard samples, on purpose.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from eke import Run, Technique, TechniqueCallback
from eke.seams.batch import rows
from eke.seams.scoring import scoring_pass
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from eke_selective_backprop.entry import RECORD


def select(losses: Tensor, keep: float, generator: torch.Generator | None = None) -> Tensor:
    """Numbers of the samples to train on, rising, int64; ``round(keep * batch)`` of them, one at least.

    A sample whose loss is higher than a share ``p`` of the batch is drawn in proportion to ``p ** (1 / keep - 1)``,
    without replacement.

    Args:
        losses: (batch,).
        keep: Share of them.
        generator: Of the draw.

    Source:
        Jiang and others 2019, equation 3, with the power by which about ``keep`` of the samples would be kept.
    """
    count = len(losses)
    ranks = torch.empty(count, dtype=torch.float64)
    ranks[losses.argsort(stable=True)] = torch.arange(0.5, count, dtype=torch.float64)
    chances = (ranks / count) ** (1 / keep - 1)
    return torch.multinomial(chances, max(1, round(keep * count)), generator=generator).sort().values


class SelectiveBackprop(TechniqueCallback):
    """Train on the samples of a batch whose loss is high, in a window of the run.

    Losses of single samples are captured from ``eke.reduce_loss(losses)`` in ``training_step``, or from its one plain
    ``cross_entropy``.

    Example::

        trainer = Trainer(max_epochs=90, callbacks=[SelectiveBackprop()])

    Args:
        keep: Share of a batch that is trained on. It saves time below 2/3, if a backward pass costs two forward ones.
        start: Share of the run after which it begins.
        end: Share of the run after which all samples are trained on again.
        interrupt: Every so manieth step trains on the whole batch; 0 for none.

    Raises:
        ValueError: numbers outside their range; losses that cannot be followed back to the samples.
        MisconfigurationException: a run without an end.
    """

    technique: ClassVar[Technique] = RECORD

    def __init__(self, keep: float = 0.5, *, start: float = 0.5, end: float = 0.9, interrupt: int = 2) -> None:
        if not 0 < keep <= 1:
            raise ValueError(f"keep={keep}: give a share of the batch, above 0 and at most 1.")
        if not 0 <= start <= end <= 1:
            raise ValueError(f"start={start}, end={end}: give shares of the run, start before end.")
        if interrupt < 0 or interrupt == 1 or interrupt != int(interrupt):
            raise ValueError(f"interrupt={interrupt}: give 2 or more steps, or 0 for no whole batches between.")
        self.keep, self.start, self.end, self.interrupt = keep, start, end, interrupt
        self._total = 0.0
        self._kind = ""
        self._module: LightningModule | None = None

    def check(self, run: Run) -> None:
        trainer = run.trainer
        pl_module = run.module
        if trainer.state.fn != "fit":
            return
        self._module = pl_module
        if trainer.max_steps < 1 and trainer.max_epochs == -1:
            raise MisconfigurationException(
                "SelectiveBackprop goes by shares of the run, and this Trainer has no end. Give max_steps or "
                "max_epochs."
            )

    def end_run(self, run: Run) -> None:
        self._module = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._total = float(trainer.estimated_stepping_batches)
        if self._total == float("inf"):
            raise MisconfigurationException(
                "SelectiveBackprop goes by shares of the run, and the data does not say how long an epoch is. Give "
                "max_steps."
            )

    @property
    def selecting(self) -> bool:
        """Whether the step at hand trains on a part of the batch."""
        step = self.progress.steps
        inside = self.start * self._total <= step < self.end * self._total
        return self.keep < 1 and inside and not (self.interrupt and step % self.interrupt == 0)

    def around_step(self, run: Run, call_next: Any, batch: Any, *args: Any) -> Any:
        self._kind = "selects" if self.selecting else "plain"
        if self._kind == "plain":
            return call_next(batch, *args)
        captured = scoring_pass(self._module, call_next, batch, *args)
        return call_next(rows(batch, select(captured.losses, self.keep, self.generator)), *args)

    def step_kind(self) -> str:
        return self._kind

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_module": None}
