"""Selective backprop: a forward pass over each batch, and a training step on the samples with the higher losses.

Source: Jiang, Wong, Zhou and others, "Accelerating Deep Learning by Focusing on the Biggest Losers", 2019,
https://arxiv.org/abs/1910.00762. It has the form that MosaicML Composer gave it: a fixed number of samples is drawn
without replacement from one batch, in a window of the run, and not in every step. The samples are not weighted: the
gradient is biased towards hard samples, on purpose.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from eke import ArgumentError, Run, Technique, TechniqueCallback
from eke.seams.batch import part_of
from eke.seams.losses import on_chosen
from eke.seams.scoring import scoring_pass
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
            raise ArgumentError(f"keep={keep}: give a share of the batch, above 0 and at most 1.")
        if not 0 <= start <= end <= 1:
            raise ArgumentError(f"start={start}, end={end}: give shares of the run, start before end.")
        if interrupt < 0 or interrupt == 1 or interrupt != int(interrupt):
            raise ArgumentError(f"interrupt={interrupt}: give 2 or more steps, or 0 for no whole batches between.")
        self.keep, self.start, self.end, self.interrupt = keep, start, end, interrupt
        self._kind = ""

    def check(self, run: Run) -> None:
        if run.fitting:
            self._until = run.until(float(self.start), "start"), run.until(float(self.end), "end")

    def selecting(self) -> bool:
        """Whether the step at hand trains on a part of the batch."""
        begins, ends = self._until
        inside = begins.reached and not ends.reached
        return self.keep < 1 and inside and not (self.interrupt and self.progress.steps % self.interrupt == 0)

    def around_step(self, run: Run, call_next: Any, batch: Any, *args: Any) -> Any:
        self._kind = run.once("kind", lambda: "selects" if self.selecting() else "plain")
        if self._kind == "plain":
            return call_next(batch, *args)
        chosen, mean = run.once("chosen", lambda: self._choose(run, call_next, batch, args))
        return on_chosen(run, call_next, batch, chosen, mean, *args)

    def _choose(self, run: Run, step: Any, batch: Any, args: Any) -> tuple[Tensor, Tensor]:
        """Numbers of the samples of a batch to train on, and the mean loss of all of its samples."""
        scored = scoring_pass(run.module, step, batch, *args)
        part_of(len(scored.losses), self.keep, type(self).__name__)  # says where that is all
        return select(scored.losses, self.keep, run.generator), scored.mean

    def step_kind(self) -> str:
        return self._kind
