"""Layer dropping: each step skips some blocks at random, more of the deeper ones, more as training goes on.

Sources: Zhang and He, "Accelerating Training of Transformer-Based Language Models with Progressive Layer Dropping",
NeurIPS 2020, https://arxiv.org/abs/2010.13369, section 4 (progressive); Huang, Sun, Liu, Sedra, Weinberger, "Deep
Networks with Stochastic Depth", ECCV 2016, https://arxiv.org/abs/1603.09382, equation 4 (constant). Survey section 2.1,
reference [97].
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from typing import Any, ClassVar, Literal

import torch
from eke import ArgumentError, Run, Technique, TechniqueCallback, compat, in_run
from eke.seams import interceptor
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

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
        blocks: Dotted paths of lists of blocks, one or several. By default all of the model: of an encoder and a
            decoder, of two towers, of each stage. The probabilities are those of a block's place in its own list.

    A first block that makes what the others hand on, such as T5's position bias, always runs. Where all blocks of a
    list are skipped, or all that would train, one runs all the same and adds nothing: a router's loss, and backward,
    need one.

    Raises:
        ValueError: ``keep`` outside (0, 1], ``gamma`` below zero, another schedule.
        MisconfigurationException: a strategy that shards the model; a run of unknown length without ``gamma``.
    """

    technique: ClassVar[Technique] = RECORD
    _blocks: interceptor.InterceptedBlocks | None = in_run(None)
    _makers: list[bool] = in_run(list)  # lists whose first block makes what the others hand on
    _kind: str = in_run("")

    def __init__(
        self,
        keep: float = 0.5,
        *,
        schedule: Literal["progressive", "constant"] = "progressive",
        gamma: float | None = None,
        rescale: bool = True,
        blocks: str | Sequence[str] | None = None,
    ) -> None:
        if not 0 < keep <= 1:
            raise ArgumentError(f"keep={keep} is no probability above 0. Give 0.5, or 1 to skip nothing.")
        if schedule not in ("progressive", "constant"):
            raise ArgumentError(f"schedule={schedule!r} is none of: progressive, constant.")
        if gamma is not None and (gamma < 0 or schedule == "constant"):
            raise ArgumentError(
                f"gamma={gamma} with schedule={schedule!r}: give 0 or more, with the progressive schedule."
            )
        self.keep, self.schedule, self.gamma, self.rescale, self.blocks = keep, schedule, gamma, rescale, blocks

    def check(self, run: Run) -> None:
        if not run.fitting:
            return
        compat.expect_unused_parameters(run.trainer.strategy)
        if self.schedule == "progressive" and self.gamma is None:
            run.until(1.0)  # the schedule goes by the length of the run

    def alter_model(self, run: Run) -> None:
        self._blocks = run.blocks(self.blocks)
        self._makers = [set(found.extra) == {0} for found in self._blocks.found]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        last, self._kind = self._last(), ""
        if last == 1:
            return
        lists = self._blocks.lists()
        chances = [keep_probabilities(len(blocks), last) for blocks in lists]
        for own, maker in zip(chances, self._makers, strict=True):
            own[0] = 1 if maker else own[0]
        runs = [torch.rand(len(own), dtype=torch.float64, generator=self.generator) < own for own in chances]
        silent = self._silent(pl_module, lists, runs)
        for blocks, own, run_now in zip(lists, chances, runs, strict=True):
            for place, (block, chance, runs_now) in enumerate(zip(blocks, own.tolist(), run_now.tolist(), strict=True)):
                if runs_now:
                    actions = [Rescale(chance, place == 0)] if self.rescale and chance < 1 else []
                elif block in silent:
                    actions = [Silent()]
                else:
                    actions = [SkipFirst() if place == 0 else interceptor.Skip()]
                self._blocks.put(block, *actions)
        count = sum(int(one.sum()) for one in runs) + len(silent)
        self._kind = f"{count} of {len(self._blocks)} blocks"

    def _silent(self, module: LightningModule, lists: list[list[nn.Module]], runs: list[Tensor]) -> list[nn.Module]:
        """Blocks that run although they were drawn to be skipped, and add nothing."""
        silent = [_first_trained(blocks) for blocks, own in zip(lists, runs, strict=True) if not own.any()]
        blocks = [block for one in lists for block in one]
        run = [block for block, runs_now in zip(blocks, torch.cat(runs).tolist(), strict=True) if runs_now]
        if not any(map(_trains, (*run, *silent))) and any(map(_trains, blocks)):
            inside = {id(parameter) for block in blocks for parameter in block.parameters()}
            if not any(one.requires_grad and id(one) not in inside for one in module.parameters()):
                silent.append(_first_trained(blocks))
        return silent

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._kind:  # validation, and whoever looks in between, sees the model whole
            self._blocks.clear()

    def step_kind(self) -> str:
        return self._kind or "all blocks"

    def _last(self) -> float:
        """How likely the last block is to run now."""
        if self.schedule == "constant":
            return self.keep
        if self.gamma is None:
            return theta(self.progress.share, self.keep, 100)
        return theta(self.progress.steps, self.keep, self.gamma)


def _trains(block: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in block.parameters())


def _first_trained(blocks: list[nn.Module]) -> nn.Module:
    return next(filter(_trains, blocks), blocks[0])


class SkipFirst(interceptor.Skip):
    """The first block is skipped, unless it makes what the others hand on."""

    def __call__(self, call_next: Any, hidden: Tensor, args: Any, kwargs: Any, form: interceptor.Form) -> Any:
        if form.length is None or form.carries:  # the first batch of a run, or the first after a resume
            interceptor.show(call_next, hidden, args, kwargs)
        if form.carries or form.made_here(args, kwargs):
            return call_next(hidden, args, kwargs)
        return super().__call__(call_next, hidden, args, kwargs, form)


class Silent:
    """The block runs and adds nothing: its gradient is zero."""

    priority = 0

    def __call__(self, call_next: Any, hidden: Tensor, args: Any, kwargs: Any, form: interceptor.Form) -> Any:
        output = call_next(hidden, args, kwargs)
        whole = output[0] if isinstance(output, tuple) else output
        nothing = hidden + 0 * (whole - hidden)
        return (nothing, *output[1:]) if isinstance(output, tuple) else nothing


class Rescale:
    """What the block adds to its input, over the probability that it runs: ``x + (block(x) - x) / chance``.

    Args:
        chance: That it runs.
        first: Of its list. One that makes what the others hand on always runs, and is not scaled.
    """

    priority = 0

    def __init__(self, chance: float, first: bool = False) -> None:
        self.chance, self.first = chance, first

    def __call__(self, call_next: Any, hidden: Tensor, args: Any, kwargs: Any, form: interceptor.Form) -> Any:
        output = call_next(hidden, args, kwargs)
        if self.first and interceptor.makes(output, args, kwargs):
            return output
        whole = output[0] if isinstance(output, tuple) else output
        x = hidden.float()  # in bfloat16 the difference would lose a third of its digits
        scaled = (x + (whole.float() - x) / self.chance).to(whole.dtype)
        return (scaled, *output[1:]) if isinstance(output, tuple) else scaled
