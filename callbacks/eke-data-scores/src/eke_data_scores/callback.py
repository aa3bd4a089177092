"""Data pruning: score the samples of a short run, and train on those that the scores choose.

Sources: Paul, Ganguli, Dziugaite, "Deep Learning on a Data Diet: Finding Important Examples Early in Training", NeurIPS
2021, https://arxiv.org/abs/2107.07075 (EL2N); Toneva, Sordoni, Combes and others, "An Empirical Study of Example
Forgetting during Deep Neural Network Learning", ICLR 2019, https://arxiv.org/abs/1812.05159. Survey section
2.2, reference [70]. ``balance`` is that of Sorscher and others, reference [81].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from eke import ArgumentError, Run, Technique, TechniqueCallback
from eke.seams.losses import LossError, capture
from eke.seams.samples import Samples, all_ranks, joined
from eke.seams.scores import Scores, check_data, fingerprint
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from eke_data_scores import pruning
from eke_data_scores.choice import choose, classes_of, el2n
from eke_data_scores.entry import RECORD


class Score(TechniqueCallback):
    """Score every training sample while the run trains as it would, and write a file when it ends.

    A file that is there already, of the same data, becomes the mean over its runs and this one: EL2N is meant to be the
    mean over some ten short runs from different starts.

    Example::

        for seed in range(10):
            seed_everything(seed)
            Trainer(max_epochs=5, callbacks=[Score("el2n.npz")]).fit(Model(), data)

    Args:
        file: Where the scores go.
        kind: ``"el2n"``: length of the error vector in the last epoch. ``"loss"``: the loss in the last epoch.
            ``"forgetting"``: how often a sample was right and then wrong, over all epochs; infinite for one that was
            never right. ``"el2n"`` and ``"forgetting"`` need a plain ``cross_entropy`` over classes.

    Raises:
        ValueError: another kind; a file of other data; losses that cannot be followed back to the samples.
    """

    technique: ClassVar[Technique] = RECORD
    must_not_change = ("kind",)
    writes_files: ClassVar[bool] = True

    def __init__(self, file: str | Path, kind: Literal["el2n", "forgetting", "loss"] = "el2n") -> None:
        if kind not in ("el2n", "forgetting", "loss"):
            raise ArgumentError(f"kind={kind!r} is none of: el2n, forgetting, loss.")
        self.file, self.kind = str(file), kind
        self._reset()

    def _reset(self) -> None:
        self._samples = Samples()
        self._data = ""
        self._captured: list[tuple[Tensor, Tensor]] = []  # of this process, in the running epoch
        self._last = torch.zeros(0)  # of each sample: what the last finished epoch gave
        self._forgot = torch.zeros(0)
        self._learned = torch.zeros(0)

    def check(self, run: Run) -> None:
        if run.fitting:
            self._reset()

    def alter_loader(self, run: Run, loader: Any) -> Any:
        loader = self._samples.attach(run, loader)
        if not self._data:
            self._data = fingerprint(loader.dataset)
            if Path(self.file).exists():
                before = Scores.load(self.file)
                check_data(before, loader.dataset, self.file)
                before.merged(Scores(self.kind, before.values, 1, before.data))  # refuses another kind before the run
        if not len(self._last):
            count = self._samples.count
            self._last = torch.full((count,), torch.nan, dtype=torch.float64)
            self._forgot, self._learned = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.bool)
        return loader

    def around_step(self, run: Run, call_next: Any, batch: Any, *args: Any) -> Any:
        numbers = run.once("samples", self._samples.batch)
        with capture(len(numbers), lambda losses: None, batch) as captured:
            output = call_next(batch, *args)
        values = self._value(captured)
        if run.first_pass:
            self._captured.append((numbers, values))
        return output

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        numbers, values = all_ranks(trainer, *joined(self._captured))
        self._captured = []
        values = values.double()
        if self.kind == "forgetting":
            right = values > 0
            self._forgot[numbers] += ((self._last[numbers] > 0) & ~right).double()
            self._learned[numbers] |= right
        self._last[numbers] = values

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = self._last
        if self.kind == "forgetting":
            values = torch.where(self._learned, self._forgot, torch.inf)
        if trainer.is_global_zero and not values.isnan().any():  # all samples were seen: an epoch came to its end
            scores = Scores(self.kind, values, 1, self._data)
            file = Path(self.file)
            (Scores.load(file).merged(scores) if file.exists() else scores).save(file)

    def state_dict(self) -> dict[str, Any]:
        numbers, values = joined(self._captured)
        self._captured = [(numbers, values)]  # once: the state is asked for at each batch
        own = {"last": self._last, "forgot": self._forgot, "learned": self._learned, "data": self._data}
        return {**own, "samples": self._samples.state_dict(), "numbers": numbers, "values": values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._last, self._forgot, self._learned = state["last"], state["forgot"], state["learned"]
        self._samples.load_state_dict(state["samples"])
        self._captured = [(state["numbers"], state["values"])]

    def _value(self, captured: Any) -> Tensor:
        losses = captured.check()
        if self.kind == "loss":
            return losses
        logits, target = captured.logits, captured.target
        if logits is None or logits.ndim != 2 or len(logits) != captured.samples or target.ndim != 1:
            raise LossError(
                f"Score(kind={self.kind!r}) compares logits with classes, and training_step has no plain cross_entropy "
                "of (batch, classes) outside of compiled code. Use kind='loss'."
            )
        if self.kind == "el2n":
            return el2n(logits, target).cpu()
        return (logits.argmax(1) == target).float().cpu()


class Pruned(TechniqueCallback):
    """Train on the samples that a file of scores chooses.

    Example::

        trainer = Trainer(max_epochs=90, callbacks=[Pruned("el2n.npz", keep=0.7)])

    Args:
        file: What :class:`Score` wrote.
        keep: Share of the samples that is kept.
        mode: ``"hard"``: those with the highest scores. ``"easy"``: the lowest. ``"random"``: the control.
        skip: Share of the samples, the very hardest, that is left out first: wrong labels are among them.
        balance: Share of each class's fair part that is kept in any case; 0.5 is what Sorscher and others take.
        seed: For ``"random"``, and for the order of equal scores.

    Raises:
        ValueError: shares outside their range; a file that is damaged, or of other data.
    """

    technique: ClassVar[Technique] = pruning.RECORD

    def __init__(
        self,
        file: str | Path,
        keep: float = 0.7,
        *,
        mode: Literal["hard", "easy", "random"] = "hard",
        skip: float = 0.0,
        balance: float = 0.0,
        seed: int = 0,
    ) -> None:
        some = torch.arange(1000)
        choose(some.double(), keep, mode, skip=skip, classes=some, balance=balance, seed=seed)  # refuses at once
        self.file, self.keep, self.mode, self.skip, self.seed = str(file), keep, mode, skip, seed
        self.balance = balance
        self._samples = Samples()

    def check(self, run: Run) -> None:
        if run.fitting:
            self._samples = Samples()

    def alter_loader(self, run: Run, loader: Any) -> Any:
        loader = self._samples.attach(run, loader)
        scores = Scores.load(self.file)
        check_data(scores, loader.dataset, self.file)
        classes = classes_of(loader.dataset) if self.balance else None
        kept = choose(
            scores.values,
            self.keep,
            self.mode,
            skip=self.skip,
            classes=classes,
            balance=self.balance,
            seed=self.seed,
        )
        self._samples.kept = torch.zeros(self._samples.count, dtype=torch.bool).index_fill(0, kept, True)
        return loader

    def begin_samples(self, run: Run) -> None:
        self._samples.begin()
