"""Rematerialization: keep the inputs of blocks, and compute what lies inside them again during backward.

Sources: Chen, Xu, Zhang, Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016,
https://arxiv.org/abs/1604.06174, section 4 (blocks, spans of several); Korthikanti and others, "Reducing Activation
Recomputation in Large Transformer Models", 2022, https://arxiv.org/abs/2205.05198, section 5 (by operator). Survey
section 3, reference [15].
"""

from __future__ import annotations

from typing import Any, Literal

from eke import ArgumentError, Run, TechniqueCallback, in_run
from eke.seams import interceptor
from eke.seams.blocks import Blocks, find_all_blocks
from eke.seams.recompute import Policy, Recomputing, recompute, spans
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from eke_remat.entry import RECORD
from eke_remat.policies import POLICIES


class Remat(TechniqueCallback):
    """Train with recomputed blocks: far less memory for activations, for up to a third more time.

    Values and gradients keep their bits, with dropout too.

    Example::

        trainer = Trainer(callbacks=[Remat()])

    Args:
        policy: What is kept of a block all the same. ``"attention"``: the results of attention; ``"matmuls"``: those of
            all matrix products too; ``"every second"``: those of every second one. Or a list of operators, or a
            function as ``torch.utils.checkpoint.create_selective_checkpoint_contexts`` takes it. By default nothing.
        every: Recompute one block in this many, or one span.
        span: Blocks that are recomputed as one, of which only the first one's input is kept. With L blocks of x bytes
            of input and A bytes inside, L / span * x + span * A bytes are held. A Transformer block's A is about 17 x,
            so that 2 pays from 34 blocks on.
        blocks: Dotted path of a list of blocks, or several. By default all lists of blocks that hold attention.
        own: What to do with a model that recomputes by itself, as Hugging Face's do when told to: ``"take over"``
            switches that off for the run, ``"leave"`` leaves it to the model.

    Raises:
        ValueError: ``every`` or ``span`` below 1; another policy.
        RecomputeError: another technique recomputes these blocks, or the model wraps them itself.
    """

    technique = RECORD
    _lists: list[Blocks] = in_run(list)
    _held: list[list[Any]] = in_run(list)
    _done: list[Recomputing] = in_run(list)

    def __init__(
        self,
        policy: Literal["attention", "matmuls", "every second"] | Policy | None = None,
        *,
        every: int = 1,
        span: int = 1,
        blocks: str | list[str] | None = None,
        own: Literal["take over", "leave"] = "take over",
    ) -> None:
        spans(1, span, every)  # refuses what makes no sense
        if isinstance(policy, str) and policy not in POLICIES:
            raise ArgumentError(
                f"policy={policy!r} is none of {', '.join(map(repr, POLICIES))}, a list and a function."
            )
        if own not in ("take over", "leave"):
            raise ArgumentError(f"own={own!r} is neither 'take over' nor 'leave'.")
        self.policy, self.every, self.span, self.blocks, self.own = policy, every, span, blocks, own

    def alter_model(self, run: Run) -> None:
        if not run.fitting:
            return
        self._lists = find_all_blocks(run.module, self.blocks)
        self._begin(run)
        rank_zero_info(self._summary())
        run.at_end(self._undo)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        now = [list(found.container) for found in self._lists]
        # Modules are equal where they are the same: another technique has put some in. None are held while it is off.
        if self._held and now != self._held:
            self._undo()
            self._begin(self.run)

    def _begin(self, run: Run) -> None:
        policy = POLICIES[self.policy] if isinstance(self.policy, str) else self.policy
        for found in self._lists:
            blocks = list(found.container)
            interceptor.detach(blocks, run.name)  # a copied block has brought its original's
            regions = spans(len(blocks), self.span, self.every)
            done = recompute(blocks, regions, owner=run.name, policy=policy, model=run.module, own=self.own)
            self._held.append(blocks)
            self._done.append(done)

    def _undo(self) -> None:
        for done in reversed(self._done):
            done.undo()
        self._held, self._done = [], []

    def _summary(self) -> str:
        own = [name for done in self._done for name in done.left]
        if own:
            return f"Remat leaves recomputing to the model, whose {own[0]} is on."
        taken = any(done.taken_over for done in self._done)
        count, all_of_them = sum(map(self._recomputed, self._held)), sum(map(len, self._held))
        return (
            f"Remat: {count} of {all_of_them} blocks are recomputed"
            + (f", {self.span} at a time" if self.span > 1 else "")
            + (f", {self.policy} kept" if isinstance(self.policy, str) else "")
            + ("; the model's own recomputing is off for the run." if taken else ".")
        )

    def _recomputed(self, blocks: list[Any]) -> int:
        return sum(map(len, spans(len(blocks), self.span, self.every)))
