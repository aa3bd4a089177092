"""InfoBatch: each epoch leaves out some of the samples whose loss is below the mean, and re-weights the others.

Source: Qin, Wang, Zheng, Gu, Peng, Xu, Zhou, Shang, Sun, Xie, You, "InfoBatch: Lossless Training Speed Up by Unbiased
Dynamic Data Pruning", ICLR 2024, https://arxiv.org/abs/2303.04947, section 2. Survey section 2.2.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from eke import ArgumentError, Run, Technique, TechniqueCallback
from eke.seams.losses import capture
from eke.seams.samples import Samples, all_ranks, finite, joined, keep_pace
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from eke_infobatch.entry import RECORD


def plan_epoch(scores: Tensor, seen: Tensor, ratio: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which samples an epoch sees, and with which weight.

    Of the samples with a score below the mean, a random ``round(ratio * number)`` are left out, but never all; the
    others of them get the weight that makes up for those: all of them over those that stay. The weights add up to the
    number of samples.

    Args:
        scores: Each sample's last loss, (samples,), float64.
        seen: Which samples have one, bool. The others are kept as they are.
        ratio: Share that is left out.
        generator: Of the draw.

    Returns:
        Numbers of the samples that stay, rising, and a weight for every sample, 0 for one that is left out.

    Source:
        Qin et al. 2024, equations 2 and 3. The authors' code weighs by ``1 / (1 - ratio)``, which rounding makes wrong.
    """
    weights = torch.ones_like(scores)
    if seen.any():
        mean = scores[seen].mean()
        # By more than rounding: the mean of equal scores may lie above each of them, and all would count as learned.
        low = ((scores < mean - 1e-9 * mean.abs()) & seen).nonzero()[:, 0]
        dropped = min(round(ratio * len(low)), len(low) - 1)  # one stays for the others
        if dropped > 0:
            weights[low] = len(low) / (len(low) - dropped)
            weights[low[torch.randperm(len(low), generator=generator)[:dropped]]] = 0
    return (weights > 0).nonzero()[:, 0], weights


def by_step(weights: Tensor) -> Tensor:
    """An epoch's weights for a run whose steps are counted, and not its epochs.

    The weights of :func:`plan_epoch` add up to the number of samples: fewer steps an epoch are larger by as much. Where
    the steps are given, each has to have the gradient of all samples by itself: the mean weight of those that stay is
    1.
    """
    stay = weights > 0
    return weights * (stay.sum() / weights.sum())


class InfoBatch(TechniqueCallback):
    """Train on fewer samples an epoch; the expected gradient stays that of all of them.

    In a run of ``max_epochs`` that is the sum over an epoch: it has fewer steps, and each is larger by as much. In a
    run of ``max_steps`` it is the mean of each step.

    What a step logs of its loss is the plain mean over the batch; the weighted one is ``eke/infobatch/weighted_loss``.

    Losses of single samples are captured from ``eke.reduce_loss(losses)`` in ``training_step``, or from its one plain
    ``cross_entropy``.

    Example::

        trainer = Trainer(max_epochs=100, callbacks=[InfoBatch()])

    Args:
        ratio: Share of the well-learned samples that an epoch leaves out.
        start: Epochs at the beginning that see all samples: as many as losses need to mean something, one at least.
        anneal: Share of the run, at the end, that sees all samples.
        keep_pace: Learning rates that go by steps follow the epochs, and come to their end although there are
            fewer steps. Not in a run of ``max_steps``, which has as many as it would have.

    Raises:
        ValueError: numbers outside their range; losses that cannot be followed back to the samples.
        MisconfigurationException: a run without an end.
        SamplesError: data without numbers: iterable datasets, several loaders.
    """

    technique: ClassVar[Technique] = RECORD

    def __init__(self, ratio: float = 0.5, *, start: int = 1, anneal: float = 0.125, keep_pace: bool = True) -> None:
        if not 0 <= ratio < 1:
            raise ArgumentError(f"ratio={ratio}: give a share of the well-learned samples below 1.")
        if start < 1 or start != int(start):
            raise ArgumentError(f"start={start}: give epochs that see all samples, 1 or more.")
        if not 0 <= anneal <= 1:
            raise ArgumentError(f"anneal={anneal}: give a share of the run.")
        self.ratio, self.start, self.anneal, self.keep_pace = ratio, start, anneal, keep_pace
        self._reset()

    def _reset(self) -> None:
        self._samples = Samples()
        self._scores = self._seen = self._weights = torch.zeros(0)
        self._captured: list[tuple[Tensor, Tensor]] = []  # of this process, since the epoch began

    def check(self, run: Run) -> None:
        if run.fitting:
            self._reset()  # a new run; one that goes on gets its state back after this

    def alter_loader(self, run: Run, loader: Any) -> Any:
        if self.ratio == 0:
            return loader
        loader = self._samples.attach(run, loader)
        if not len(self._scores):
            self._scores = torch.zeros(self._samples.count, dtype=torch.float64)
            self._seen = torch.zeros(self._samples.count, dtype=torch.bool)
            self._plan(run, 0)
        return loader

    def begin_samples(self, run: Run) -> None:
        if self.ratio:
            self._samples.begin()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.ratio:
            self._samples.begin()

    def around_step(self, run: Run, call_next: Any, batch: Any, *args: Any) -> Any:
        if self.ratio == 0:
            return call_next(batch, *args)
        numbers = run.once("samples", self._samples.batch)
        weights = self._weights[numbers].float()
        with capture(len(numbers), lambda losses: None if bool((weights == 1).all()) else weights, batch) as captured:
            output = call_next(batch, *args)
        losses = captured.check()
        run.log("weighted_loss", captured.weighted)
        if run.first_pass:
            self._captured.append((numbers, losses))
        return output

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.ratio and self.keep_pace and trainer.max_steps < 1:
            keep_pace(trainer, self._samples, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Here, and not where the next epoch begins: a checkpoint of the epoch's end has to hold the next one's samples.
        if self.ratio:
            numbers, losses = finite(*all_ranks(trainer, *joined(self._captured)), "InfoBatch")
            self._scores[numbers], self._seen[numbers] = losses.double(), True
            self._captured = []
            self._plan(self.run, trainer.current_epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        numbers, losses = joined(self._captured)
        self._captured = [(numbers, losses)]  # once: the state is asked for at each batch
        own = {"scores": self._scores, "seen": self._seen, "weights": self._weights}
        return {**own, "samples": self._samples.state_dict(), "numbers": numbers, "losses": losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scores, self._seen, self._weights = state["scores"], state["seen"], state["weights"]
        self._samples.load_state_dict(state["samples"])
        self._captured = [(state["numbers"], state["losses"])]

    def _plan(self, run: Run, epoch: int) -> None:
        prunes = self.start <= epoch and run.progress.share < 1 - self.anneal
        kept, weights = plan_epoch(self._scores, self._seen & prunes, self.ratio, self.generator)
        self._weights = by_step(weights) if run.trainer.max_steps > 0 else weights
        self._samples.kept = torch.zeros(self._samples.count, dtype=torch.bool)
        self._samples.kept[kept] = True
