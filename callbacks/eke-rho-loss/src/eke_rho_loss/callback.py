"""RHO-LOSS: of each batch, train on the samples whose loss a model could reduce that has not learned them by heart.

Source: Mindermann, Brauner, Razzak and others, "Prioritized Training on Points that are Learnable, Worth Learning, and
Not Yet Learnt", ICML 2022, https://arxiv.org/abs/2206.07137, equation 3 and algorithm 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from eke import EkeError, Run, Technique, TechniqueCallback
from eke.seams.batch import part_of
from eke.seams.losses import on_chosen
from eke.seams.samples import Samples
from eke.seams.scores import Scores, check_data
from eke.seams.scoring import scoring_pass
from torch import Tensor

from eke_rho_loss.entry import RECORD

ZERO = "zero"


class RhoLossError(EkeError, ValueError):
    """An argument, or a file of losses, by which samples cannot be chosen."""


def reducible(losses: Tensor, irreducible: Tensor, count: int) -> Tensor:
    """Numbers of the ``count`` samples with the largest ``losses - irreducible``, rising, int64.

    Args:
        losses: (batch,), of the model that trains.
        irreducible: (batch,), of a model that has not been trained on these samples.
        count: How many.

    Source:
        Mindermann and others 2022, equation 3.
    """
    return (losses.double() - irreducible).topk(count).indices.sort().values


class RhoLoss(TechniqueCallback):
    """Train on the samples of a batch whose loss is reducible: neither learned already, nor noise.

    Give the loader a batch that is larger by ``1 / keep`` than what a step is to train on.

    Example::

        from eke_rho_loss import cross_scores

        cross_scores(train_small_model, data).save("irreducible.npz")  # two models, each on one half
        trainer = Trainer(max_epochs=90, callbacks=[RhoLoss("irreducible.npz")])

    Args:
        file: Losses of the training samples, by a model that has not been trained on them: from a holdout
            (``score``), or from two models, each trained on one half (``cross_scores``). The word
            ``"zero"`` takes them as 0: the highest losses alone are chosen, wrong labels first. It is the control.
        keep: Share of a batch that is trained on.
        look: In which mode the samples' losses are taken: ``"evaluation"``, without dropout, or ``"training"``, as the
            authors' code has it by default.

    Raises:
        ValueError: a share outside its range; another mode; a file that is damaged, of other data, or of other scores
            than losses; losses that cannot be followed back to the samples.
        SamplesError: with a file, data without numbers: iterable datasets, several loaders.
    """

    technique: ClassVar[Technique] = RECORD

    def __init__(
        self, file: str | Path, keep: float = 0.1, *, look: Literal["evaluation", "training"] = "evaluation"
    ) -> None:
        if look not in ("evaluation", "training"):
            raise RhoLossError(f"look={look!r} is none of: evaluation, training.")
        if not 0 < keep <= 1:
            raise RhoLossError(f"keep={keep}: give a share of the batch, above 0 and at most 1.")
        self.file, self.keep, self.look = str(file), keep, look
        self._reset()

    def _reset(self) -> None:
        self._samples = Samples()
        self._irreducible = torch.zeros(0)

    def check(self, run: Run) -> None:
        if run.fitting:
            self._reset()

    def alter_loader(self, run: Run, loader: Any) -> Any:
        if self.file == ZERO or self.keep == 1:
            return loader
        loader = self._samples.attach(run, loader)
        scores = Scores.load(self.file)
        check_data(scores, loader.dataset, self.file)
        if scores.kind != "loss" or not bool(scores.values.isfinite().all()):
            raise RhoLossError(
                f"{self.file} holds {scores.kind} scores; RHO-LOSS compares losses with finite losses. Write them with "
                "eke_rho_loss.score(model, data, 'loss'), or with cross_scores."
            )
        self._irreducible = scores.values
        return loader

    def around_step(self, run: Run, call_next: Any, batch: Any, *args: Any) -> Any:
        if self.keep == 1:
            return call_next(batch, *args)
        chosen, mean = run.once("chosen", lambda: self._choose(run, call_next, batch, args))
        return on_chosen(run, call_next, batch, chosen, mean, *args)

    def _choose(self, run: Run, step: Any, batch: Any, args: Any) -> tuple[Tensor, Tensor]:
        """Numbers of the samples of a batch to train on, and the mean loss of all of its samples."""
        scored = scoring_pass(run.module, step, batch, *args, training=self.look == "training")
        losses = scored.losses
        irreducible = torch.zeros(len(losses)) if self.file == ZERO else self._irreducible[self._samples.batch()]
        return reducible(losses, irreducible, part_of(len(losses), self.keep, type(self).__name__)), scored.mean

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self._samples.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._samples.load_state_dict(state["samples"])
