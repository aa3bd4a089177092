"""Importance sampling without a look: samples are drawn by the gradient norms that they had when they were last seen.

Source: Johnson, Guestrin, "Training Deep Models Faster with Robust, Approximate Importance Sampling", NeurIPS 2018;
survey section 2.2, reference [44]. It is in the spirit of RAIS: as there, the expected square of a norm is a linear
function of features, the last norm and its age, which is fitted while training and is robust in that it regresses to
the mean. It departs in that the fit is one of least squares once an epoch, where the paper solves for an uncertainty
set, and in that learning rates are left alone, where the paper scales them by the gain.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from eke import ArgumentError, Run, Technique, TechniqueCallback
from eke.seams.losses import capture
from eke.seams.samples import Samples, all_ranks, finite, joined
from eke.seams.scoring import error_norms
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from eke_importance_sampling import entry_rais
from eke_importance_sampling.callback import gain


def fit_squares(before: Tensor, age: Tensor, now: Tensor) -> Tensor:
    """Weights of the features (1, square of the last norm, its age), (3,), float64, none of them negative.

    Args:
        before: Norms as they were remembered, (samples,).
        age: Epochs since, (samples,).
        now: Norms as they are seen again, (samples,).
    """
    features = _features(before, age)
    weights, active = torch.zeros(3, dtype=torch.float64), [0, 1, 2]
    while active:  # of three features, leave out the most negative until none is
        found = torch.linalg.lstsq(features[:, active], now.double().square()[:, None], driver="gelsd").solution[:, 0]
        if bool((found >= 0).all()):
            weights[active] = found
            break
        active.pop(int(found.argmin()))
    return weights


def mixed(scores: Tensor, floor: float) -> Tensor:
    """Probabilities, (samples,), float64: in proportion to the scores, but for a share that all have alike."""
    scores = scores.double()
    alike = torch.full_like(scores, 1 / len(scores))
    total = scores.sum()
    return (1 - floor) * scores / total + floor * alike if total > 0 else alike


def _features(norms: Tensor, age: Tensor) -> Tensor:
    norms = norms.double()
    return torch.stack([torch.ones_like(norms), norms.square(), age.double()], dim=1)


class RAIS(TechniqueCallback):
    """Draw the samples of each epoch by the gradient norms they had when last seen, weighted without bias.

    There is no extra pass: norms come from the steps themselves. An epoch has as many samples as before, some of them
    several times and some not at all.

    Example::

        trainer = Trainer(max_epochs=100, callbacks=[RAIS()])

    Args:
        floor: Share of the draws that is made among all samples alike: weights stay below ``1 / floor``.
        start: Epochs at the beginning that see every sample once.

    Raises:
        ValueError: numbers outside their range; losses that cannot be followed back to the samples, or have no logits.
        SamplesError: data without numbers: iterable datasets, several loaders.
    """

    technique: ClassVar[Technique] = entry_rais.RECORD

    def __init__(self, floor: float = 0.2, *, start: int = 1) -> None:
        if not 0 < floor <= 1:
            raise ArgumentError(f"floor={floor}: give a share of the draws, above 0; 1 draws all alike.")
        if start < 1 or start != int(start):
            raise ArgumentError(f"start={start}: give epochs that see every sample once, 1 or more.")
        self.floor, self.start = floor, start
        self._reset()

    def _reset(self) -> None:
        self._samples = Samples()
        self._norms = self._age = self._weights = torch.zeros(0)
        self._captured: list[tuple[Tensor, Tensor]] = []  # of this process, since the epoch began
        self.gain = 1.0

    def check(self, run: Run) -> None:
        if run.fitting:
            self._reset()

    def alter_loader(self, run: Run, loader: Any) -> Any:
        loader = self._samples.attach(run, loader)
        if not len(self._norms):
            count = self._samples.count
            self._norms, self._age = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.int64)
            self._weights = torch.ones(count, dtype=torch.float64)
        return loader

    def begin_samples(self, run: Run) -> None:
        self._samples.begin()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._samples.begin()

    def around_step(self, run: Run, call_next: Any, batch: Any, *args: Any) -> Any:
        numbers = run.once("samples", self._samples.batch)
        weights = None if self._samples.order is None else self._weights[numbers].float()
        with capture(len(numbers), lambda losses: weights, batch) as captured:
            output = call_next(batch, *args)
        captured.check()
        run.log("weighted_loss", captured.weighted)
        if run.first_pass:
            self._captured.append((numbers, error_norms(captured)))
        return output

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Here, and not where the next epoch begins: a checkpoint of the epoch's end has to hold the next one's samples.
        numbers, norms = finite(*all_ranks(trainer, *joined(self._captured)), "RAIS")
        self._captured = []
        self._age += 1
        known = trainer.current_epoch > 0 and len(numbers) > 0
        squares = fit_squares(self._norms[numbers], self._age[numbers], norms) if known else torch.tensor([0.0, 1, 0])
        self._norms[numbers], self._age[numbers] = norms.double(), 0
        if trainer.current_epoch + 1 < self.start:
            return
        expected = (_features(self._norms, self._age) @ squares.double()).clamp(min=0).sqrt()
        shares = mixed(expected, self.floor)
        self.gain = gain(shares)
        # Not torch.multinomial, which stops at 2 ** 24 samples.
        points = torch.rand(self._samples.count, generator=self.generator, dtype=torch.float64)
        self._samples.order = torch.searchsorted(shares.cumsum(0), points).clamp(max=self._samples.count - 1)
        self._weights = 1 / (self._samples.count * shares)

    def state_dict(self) -> dict[str, Any]:
        numbers, norms = joined(self._captured)
        self._captured = [(numbers, norms)]  # once: the state is asked for at each batch
        own = {"norms": self._norms, "age": self._age, "weights": self._weights, "gain": self.gain}
        return {**own, "samples": self._samples.state_dict(), "numbers": numbers, "captured": norms}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._norms, self._age, self._weights = state["norms"], state["age"], state["weights"]
        self.gain = state["gain"]
        self._samples.load_state_dict(state["samples"])
        self._captured = [(state["numbers"], state["captured"])]
