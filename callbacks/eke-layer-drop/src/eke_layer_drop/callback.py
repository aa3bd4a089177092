"""Layer dropping: each step skips some blocks at random, more of the deeper ones, more as training goes on.

Sources: Zhang and He, "Accelerating Training of Transformer-Based Language Models with Progressive Layer Dropping",
NeurIPS 2020, https://arxiv.org/abs/2010.13369, section 4 (progressive); Huang, Sun, Liu, Sedra, Weinberger, "Deep
Networks with Stochastic Depth", ECCV 2016, https://arxiv.org/abs/1603.09382, equation 4 (constant). Survey section 2.1,
reference [97].
"""

from __future__ import annotations

from math import exp
from typing import Any, ClassVar, Literal

import torch
from eke import Run, Technique, TechniqueCallback, compat
from eke.seams import interceptor
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from eke_layer_drop.entry import RECORD


def theta(step: float, keep: float, gamma: float) -> float:
    """How likely the last block is to run at an optimizer step: ``(1 - keep) exp(-gamma step) + keep``.

    Args:
        step: Optimizer steps done, or the share of the run that is done.
        keep: What it falls to, theta-bar in the paper.
        gamma: How fast, for each step, or for the whole run: with 100 for the whole it is at 0.68 after 1 % of it for
            ``keep=0.5``.

    Source:
        Zhang and He 2020, section 4.2.
    """
    return (1 - keep) * exp(-gamma * step) + keep


def keep_probabilities(depth: int, last: float) -> Tensor:
    """How likely each of ``depth`` blocks is to run: ``1 - i / depth * (1 - last)`` for i from 1, (depth,), float64.

    Source:
        Zhang and He 2020, section 4.2; Huang et al. 2016, equation 4. DeepSpeed's code has 1 for the first block.
    """
    return 1 - torch.arange(1, depth + 1, dtype=torch.float64) / depth * (1 - last)


class LayerDrop(TechniqueCallback):
    """Skip blocks at random while training. Validation runs them all.

    Example::

        trainer = Trainer(max_steps=10_000, callbacks=[LayerDrop(keep=0.5)])

    Args:
        keep: How likely the last block is to run, once the schedule has come to its end; the first of L blocks runs
            with ``1 - (1 - keep) / L``, those between lie on a line. With 0.5 about three quarters of them run.
        schedule: ``"progressive"``: begins with all blocks and falls exponentially (Zhang and He). ``"constant"``:
            stays the same (stochastic depth, Huang et al.).
        gamma: How fast the progressive schedule falls, for each optimizer step. By default 100 over the length of the
            run, as in the paper: it has fallen after a twentieth of it.
        rescale: Scale what a block adds by one over its probability, in float32, so that the block's expected output is
            what it gives when it always runs.
        blocks: Dotted path of the list of blocks. Needed where a model has more than one.

    Raises:
        ValueError: ``keep`` outside (0, 1], ``gamma`` below zero, another schedule.
        MisconfigurationException: a strategy that shards the model; a run of unknown length without ``gamma``.
    """

    technique: ClassVar[Technique] = RECORD

    def __init__(
        self,
        keep: float = 0.5,
        *,
        schedule: Literal["progressive", "constant"] = "progressive",
        gamma: float | None = None,
        rescale: bool = True,
        blocks: str | None = None,
    ) -> None:
        if not 0 < keep <= 1:
            raise ValueError(f"keep={keep} is no probability above 0. Give 0.5, or 1 to skip nothing.")
        if schedule not in ("progressive", "constant"):
            raise ValueError(f"schedule={schedule!r} is none of: progressive, constant.")
        if gamma is not None and (gamma < 0 or schedule == "constant"):
            raise ValueError(
                f"gamma={gamma} with schedule={schedule!r}: give 0 or more, with the progressive schedule."
            )
        self.keep, self.schedule, self.gamma, self.rescale, self.blocks = keep, schedule, gamma, rescale, blocks
        self._blocks: interceptor.InterceptedBlocks | None = None
        self._runs = 0
        self._cut = False

    def check(self, run: Run) -> None:
        if not run.fitting:
            return
        compat.expect_unused_parameters(run.trainer.strategy)
        if self.schedule == "progressive" and self.gamma is None:
            run.until(1.0)  # the schedule goes by the length of the run

    def alter_model(self, run: Run) -> None:
        self._blocks = run.blocks(self.blocks)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        last = self._last()
        self._cut = last < 1
        if not self._cut:
            return
        blocks = self._blocks.now()
        chances = keep_probabilities(len(blocks), last)
        runs = torch.rand(len(blocks), dtype=torch.float64, generator=self.generator) < chances
        self._runs = int(runs.sum())
        for block, runs_now, chance in zip(blocks, runs.tolist(), chances.tolist(), strict=True):
            self._blocks.put(block, *self._actions(runs_now, chance))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._cut:  # validation, and whoever looks in between, sees the model whole
            self._blocks.clear()

    def step_kind(self) -> str:
        return f"{self._runs} of {len(self._blocks)} blocks" if self._cut else "all blocks"

    def _last(self) -> float:
        """How likely the last block is to run now."""
        if self.schedule == "constant":
            return self.keep
        if self.gamma is None:
            return theta(self.progress.share, self.keep, 100)
        return theta(self.progress.steps, self.keep, self.gamma)

    def _actions(self, runs: bool, chance: float) -> tuple[interceptor.Action, ...]:
        if not runs:
            return (Skip(),)
        return (Rescale(chance),) if self.rescale and chance < 1 else ()


class Skip(interceptor.Skip):
    """The block is skipped, in a list none of whose blocks has run yet as well."""

    def __call__(self, call_next: Any, hidden: Tensor, args: Any, kwargs: Any, form: interceptor.Form) -> Any:
        if form.length is None:  # the first batch of a run, or the first after a resume
            with torch.no_grad(), torch.random.fork_rng(_devices(hidden)):
                call_next(hidden, args, kwargs)
        return super().__call__(call_next, hidden, args, kwargs, form)


class Rescale:
    """What the block adds to its input, over the probability that it runs: ``x + (block(x) - x) / chance``."""

    priority = 0

    def __init__(self, chance: float) -> None:
        self.chance = chance

    def __call__(self, call_next: Any, hidden: Tensor, args: Any, kwargs: Any, form: interceptor.Form) -> Any:
        output = call_next(hidden, args, kwargs)
        whole = output[0] if isinstance(output, tuple) else output
        x = hidden.float()  # in bfloat16 the difference would lose a third of its digits
        scaled = (x + (whole.float() - x) / self.chance).to(whole.dtype)
        return (scaled, *output[1:]) if isinstance(output, tuple) else scaled


def _devices(hidden: Tensor) -> list[int]:
    return [hidden.device.index] if hidden.device.type == "cuda" else []
