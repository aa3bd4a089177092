"""Importance sampling: look at a large batch, and train on the part of it that has the larger gradients.

Source: Katharopoulos, Fleuret, "Not All Samples Are Created Equal: Deep Learning with Importance Sampling", ICML 2018,
https://arxiv.org/abs/1803.00942; survey section 2.2, reference [47]. It departs from the authors' code in that the
loader's batch is the presample, so that a loader with any number of workers serves, and that sequences of unequal
length keep the mean over tokens unbiased.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from eke import ArgumentError, Run, Technique, TechniqueCallback
from eke.seams.batch import part_of, rows, size
from eke.seams.losses import Capture, capture
from eke.seams.scoring import error_norms, scoring_pass
from torch import Tensor

from eke_importance_sampling.entry import RECORD


def draw(scores: Tensor, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Draw samples in proportion to their scores, with replacement.

    Args:
        scores: (presample,), 0 or more; in proportion to the length of each sample's gradient, where that is known.
        count: How many.
        generator: Of the draw.

    Returns:
        Their numbers, int64, and their weights, float32, both (count,). The mean over the draws of weight times
        anything is in expectation that thing's mean over the presample.

    Source:
        Katharopoulos and Fleuret 2018, equations 2 and 3: weight ``1 / (presample * probability)``.
    """
    shares = _shares(scores)
    chosen = torch.multinomial(shares, count, replacement=True, generator=generator)
    return chosen, (1 / (len(shares) * shares[chosen])).float()


def gain(scores: Tensor) -> float:
    """How many times as large a uniform batch would have to be, as its root, for the same variance; 1 for equal scores.

    Source:
        Katharopoulos and Fleuret 2018, equation 26, which is ``sqrt(presample * sum(shares ** 2))``.
    """
    shares = _shares(scores)
    return float((len(shares) * shares.square().sum()).sqrt())


def _shares(scores: Tensor) -> Tensor:
    scores = scores.double()
    total = scores.sum()
    if not bool(total.isfinite()):
        raise ArgumentError("A sample's loss is not finite: nothing can be drawn by it. Is the learning rate too high?")
    return scores / total if total > 0 else torch.full_like(scores, 1 / len(scores))


class ImportanceSampling(TechniqueCallback):
    """Look at each batch of the loader, and train on a part of it, drawn by gradient norm and weighted without bias.

    Give the loader a batch as large as the presample: with ``keep=1/3``, three times what a step is to train on. While
    the gain is below ``threshold`` there is no look, and a step trains on the first part of the batch as it comes.

    Example::

        loader = DataLoader(data, batch_size=3 * 64, shuffle=True)
        trainer = Trainer(max_steps=10_000, callbacks=[ImportanceSampling(keep=1 / 3)])

    Args:
        keep: Share of a batch that a step trains on.
        threshold: The gain from which on it draws. By default the one at which a look pays if a backward pass costs two
            forward ones: ``1 + 1 / (3 * keep)``. 0 draws always.
        smoothing: Of the gain over steps; 0 goes by the last step alone.
        by: ``"gradient"``: the length of the loss's gradient by the logits, for a plain ``cross_entropy``. ``"loss"``:
            the loss itself, for any loss captured from ``eke.reduce_loss``; no bound of the gradient.

    Raises:
        ValueError: numbers outside their range; losses that are not finite, or cannot be followed back to the samples.
    """

    technique: ClassVar[Technique] = RECORD

    def __init__(
        self,
        keep: float = 1 / 3,
        *,
        threshold: float | None = None,
        smoothing: float = 0.9,
        by: Literal["gradient", "loss"] = "gradient",
    ) -> None:
        if not 0 < keep <= 1:
            raise ArgumentError(f"keep={keep}: give a share of the batch, above 0 and at most 1.")
        if not 0 <= smoothing < 1 or (threshold is not None and threshold < 0):
            raise ArgumentError(
                f"smoothing={smoothing}, threshold={threshold}: give one below 1, and one of 0 or more."
            )
        if by not in ("gradient", "loss"):
            raise ArgumentError(f"by={by!r} is none of: gradient, loss.")
        self.keep, self.smoothing, self.by = keep, smoothing, by
        self.threshold = 1 + 1 / (3 * keep) if threshold is None else threshold
        self._gain = 0.0
        self._kind = ""

    def check(self, run: Run) -> None:
        if run.fitting:
            self._gain = 0.0

    def around_step(self, run: Run, call_next: Any, batch: Any, *args: Any) -> Any:
        if self.keep == 1:
            return call_next(batch, *args)
        count = part_of(size(batch), self.keep, type(self).__name__)
        self._kind = run.once("kind", lambda: "scores" if self._gain >= self.threshold else "plain")
        if self._kind == "plain":
            first = rows(batch, torch.arange(count))
            with capture(count, lambda losses: None, first) as captured:
                output = call_next(first, *args)
            scores = self._scores(captured)
        else:
            chosen, weights, scores, mean = run.once("drawn", lambda: self._draw(run, call_next, batch, args, count))
            drawn = rows(batch, chosen)
            with capture(count, lambda losses: weights, drawn, shows=mean, known=True) as captured:
                output = call_next(drawn, *args)
            captured.check()
            run.log("weighted_loss", captured.weighted)
        if run.first_pass:
            self._observe(run, scores)
        return output

    def step_kind(self) -> str:
        return self._kind

    def state_dict(self) -> dict[str, Any]:
        return {"gain": self._gain}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._gain = state["gain"]

    def _draw(self, run: Run, step: Any, batch: Any, args: Any, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Numbers and weights of the samples to train on, the scores that they were drawn by, and the mean loss of all
        that they were drawn from."""
        scored = scoring_pass(run.module, step, batch, *args)
        scores = self._scores(scored)
        chosen, weights = draw(scores, count, run.generator)
        # A loss over tokens divides by those of the batch at hand; the mean is over those of the presample.
        tokens = scored.valid.flatten(1).sum(1).cpu() if scored.valid.ndim > 1 else scored.valid.cpu()
        return (
            chosen,
            weights * float(tokens[chosen].sum() / (count * tokens.mean()).clamp(min=1e-9)),
            scores,
            scored.mean,
        )

    def _scores(self, captured: Capture) -> Tensor:
        losses = captured.check()
        return error_norms(captured) if self.by == "gradient" else losses.clamp(min=0)

    def _observe(self, run: Run, scores: Tensor) -> None:
        found = gain(scores)
        if run.world_size > 1:  # all processes have a scoring pass, or none: sharded weights are gathered in it
            mean = torch.tensor(found, device=run.device)
            found = float(run.trainer.strategy.reduce(mean, reduce_op="mean"))
        self._gain = self.smoothing * self._gain + (1 - self.smoothing) * found
