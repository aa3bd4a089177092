"""Progressive stacking: train the lower blocks first, copy them upward, go on with the deeper model.

Source: Gong, He, Li, Qin, Wang, Liu, "Efficient Training of BERT by Progressively Stacking", ICML 2019,
https://proceedings.mlr.press/v97/gong19a.html, algorithm 1. Survey section 2.1, reference [30].
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from math import ceil
from typing import Any, ClassVar, Literal

import torch
from eke import ArgumentError, Run, Technique, TechniqueCallback, compat
from eke.seams import growth, interceptor
from eke.seams.blocks import Blocks, find_all_blocks
from eke.seams.names import plain
from eke.seams.optimizer import transplant
from eke.seams.wrapped import forget_state
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from eke_stacking import operators
from eke_stacking.entry import RECORD


class Stacking(TechniqueCallback):
    """Train with part of the model's depth first.

    The user builds the full model. At each growth the blocks that run next start from those that were trained.

    Example::

        trainer = Trainer(max_steps=10_000, callbacks=[Stacking(stages=[0.125, 0.3])])  # L/4, L/2, L

    Args:
        stages: When the model grows: shares of the run, between 0 and 1, or numbers of optimizer steps. A growth waits
            for the start of an accumulation window.
        depths: Blocks that run before each growth. By default depth doubles: half, or a quarter and a half, and so on.
        operator: Where new blocks come from. ``"stack"``: copies of the trained ones on top, as in the paper.
            ``"interleave"``: each copy next to its source. ``"identity"``: on top, with output projections set to zero,
            so that the model's function stays the same; for pre-norm blocks. ``"random"``: their own random start.
        form: ``"dormant"``: all blocks are there from the start and those are skipped that do not run yet. Structure,
            optimizer and checkpoints never change. ``"growth"``: blocks that do not run yet are taken out of the model
            and their weights are freed.
        optimizer_state: ``"copy"``: a new block takes its source's optimizer state too. ``"reset_new"``: it starts
            without. ``"reset_all"``: all start without, as in the paper's script.
        blocks: Dotted paths of lists of blocks, one or several, which grow together. By default all of the model: of
            an encoder and a decoder, of two towers, of each stage. ``depths`` are those of each.

    Raises:
        ValueError: stages or depths that do not rise, or a word that is not listed above.
        MisconfigurationException: a strategy that shards the model.
    """

    technique: ClassVar[Technique] = RECORD
    must_not_change = ("form", "operator", "blocks")

    _containers: tuple[weakref.ref[nn.Module], ...] = ()

    def __init__(
        self,
        stages: Sequence[float] = (0.5,),
        *,
        depths: Sequence[int] | None = None,
        operator: Literal["stack", "interleave", "identity", "random"] = "stack",
        form: Literal["dormant", "growth"] = "dormant",
        optimizer_state: Literal["copy", "reset_new", "reset_all"] = "copy",
        blocks: str | Sequence[str] | None = None,
    ) -> None:
        stages = _times(stages)
        _check_depths(depths, stages)
        _one_of("operator", operator, operators.OPERATORS)
        _one_of("form", form, ("dormant", "growth"))
        _one_of("optimizer_state", optimizer_state, ("copy", "reset_new", "reset_all"))
        if (operator, form) == ("random", "growth"):
            raise ArgumentError(
                "operator='random' needs the weights that blocks were built with, and form='growth' frees them. "
                "Use form='dormant'."
            )
        self.stages = stages
        self.depths = None if depths is None else list(depths)
        self.operator = operator
        self.form = form
        self.optimizer_state = optimizer_state
        self.blocks = blocks
        self.active: list[int] | None = None  # which blocks run, counted in the full model
        self.steps: list[int] | None = None  # optimizer steps of the growths
        self._paths: list[str] | None = None
        self._spans: list[range] = []  # where the blocks of each list are among all
        self._plan: list[list[int]] = []  # which blocks run before, between and after the growths
        self._next: tuple[int, list[int]] | None = None  # step of the next growth, and which blocks run from then on
        self._saved_steps: list[int] | None = None
        self._full: list[nn.Module] = []  # all blocks; with form="growth" those not in the model have no weights
        self._fitting = False

    def check(self, run: Run) -> None:
        self._fitting = run.fitting
        if run.fitting and not isinstance(self.stages[0], int):
            run.until(self.stages[-1], "stages")  # shares go by the length of the run

    def refuses(self, others: Sequence[Technique]) -> str:
        freezing = [one.name for one in others if "requires_grad" in one.touches("replaces") | one.touches("changes")]
        if self.form == "dormant" or not freezing:
            return ""
        return (
            f"form='growth' frees the weights of blocks that do not run yet, and {freezing[0]!r} goes by weights that "
            "stay as they were given. Use form='dormant'."
        )

    def alter_model(self, run: Run) -> None:
        pl_module = run.module
        if not self._knows(pl_module):
            self.active = None
            if not self._fitting:
                return  # an evaluated model has the depth that its checkpoint says, or all of it
            self._meet(find_all_blocks(pl_module, self.blocks))
        if self._fitting:
            plans = [operators.positions(self._depths(len(span)), self.operator) for span in self._spans]
            self._plan = [
                [span[i] for span, own in zip(self._spans, stage, strict=True) for i in own]
                for stage in zip(*plans, strict=True)
            ]
            self._refuse(find_all_blocks(pl_module, self._paths))
        run.at_end(lambda: interceptor.detach(self._full, RECORD.name))
        run.at_end(lambda: compat.leave_out_of_ddp(pl_module, []))
        self._apply(pl_module, self.active or self._plan[0])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(self.stages[0], int):
            self.steps = self.stages
        else:
            self.steps = self._saved_steps or [ceil(stage * self.run.length) for stage in self.stages]
        self._saved_steps = None
        self._next = self._due()
        if self.form == "dormant" and compat.leave_out_of_ddp(pl_module, self._dormant()):
            growth.rewrap(trainer, drop=False)  # who came later, PEFT for one, has put parameters into dormant blocks

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # In mid-window, gradients of the shallow model would meet weights of the deep one.
        while self._next is not None and self.progress.at_boundary and self.progress.steps >= self._next[0]:
            self._grow(trainer, pl_module, self._next[1])
            self._next = self._due()

    def step_kind(self) -> str:
        if self.active is None:
            return ""  # no model yet
        return f"{len(self.active)} of {len(self._full)} blocks"

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._next is not None:
            rest = "trim() takes the others out." if self.form == "dormant" else "The others are not in the model."
            warnings.warn(
                f"The run ended after {self.progress.steps} steps, before the growth at step {self._next[0]}: "
                f"{len(self.active)} of {len(self._full)} blocks were trained. {rest}",
                stacklevel=2,
            )

    def trim(self, pl_module: LightningModule) -> None:
        """Take blocks that were never reached out of the model, in place, for export before the last growth."""
        lists = find_all_blocks(pl_module, self._paths or self.blocks)
        if self.active is not None and sum(map(len, lists)) == len(self._full):
            for found, span in zip(lists, self._spans, strict=True):
                operators.trim(found, [i - span.start for i in span if i in self.active])

    def manifest(self) -> dict[str, Any] | None:
        if self.active is None:
            return None
        if len(self.active) == len(self._full):
            return {}  # nothing to rebuild: loads without Stacking as well
        path = self._paths[0] if len(self._paths) == 1 else self._paths
        return {"form": self.form, "path": path, "active": self.active, "depth": len(self._full)}

    def shape_from(self, manifest: dict[str, Any], pl_module: LightningModule) -> None:
        if not self._knows(pl_module):
            if not manifest:
                return
            self._meet(find_all_blocks(pl_module, manifest["path"]))
        if manifest and manifest["depth"] != len(self._full):
            raise ArgumentError(
                f"the checkpoint is of a model with {manifest['depth']} blocks; this has {len(self._full)}."
            )
        if manifest and manifest["form"] != self.form:
            if self._fitting:
                raise ArgumentError(
                    f"the checkpoint was written with form={manifest['form']!r} and this Stacking has "
                    f"form={self.form!r}: optimizers and keys differ. Resume with the form it was written with."
                )
            self.form = manifest["form"]
        self._apply(pl_module, manifest["active"] if manifest else list(range(len(self._full))))

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps or self._saved_steps, "stages": self.stages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # With other stages, which the user has agreed to, those of the file say nothing.
        self._saved_steps = state["steps"] if state.get("stages", self.stages) == self.stages else None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give a model whose blocks wait outside of it all of them back, filled as by growing."""
        if self.form == "dormant" or self.active is None or len(self.active) == len(self._full):
            return
        active, everything = self.active, list(range(len(self._full)))
        self._apply(pl_module, everything)
        sources = self._sources(active, everything)
        operators.copy_blocks(self._full, sources, identity=self.operator == "identity")
        self.active = active  # with which a next fit goes on

    def alter_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """After an exception all blocks are in the model: save those that were trained, by the names they had."""
        containers = [container() for container in self._containers]
        here = sum(len(container) for container in containers if container is not None)
        if self.form == "dormant" or self.active is None or here != len(self._full) or here == len(self.active):
            return
        kept = {}
        for name, value in checkpoint["state_dict"].items():
            for path, span in zip(self._paths, self._spans, strict=True):
                number, _, rest = plain(name).removeprefix(f"{path}.").partition(".")
                if not plain(name).startswith(f"{path}.") or not number.isdigit():
                    continue
                own = [i for i in self.active if i in span]
                place = own.index(span[int(number)]) if span[int(number)] in own else None
                name = None if place is None else f"{path}.{place}.{rest}"
                break
            if name is not None:
                kept[name] = value
        checkpoint["state_dict"] = kept

    def __getstate__(self) -> dict[str, Any]:
        # A copy begins without a model; the blocks themselves go with the model.
        return {**super().__getstate__(), "_full": [], "_containers": ()}

    def _knows(self, pl_module: LightningModule) -> bool:
        """Whether this is the model whose blocks it holds."""
        here = {id(module) for module in pl_module.modules()}
        return bool(self._containers) and all(id(container()) in here for container in self._containers)

    def _meet(self, lists: list[Blocks]) -> None:
        self._containers = tuple(weakref.ref(found.container) for found in lists)
        self._paths = [plain(found.path) for found in lists]
        self._full, self._spans = [], []
        for found in lists:
            self._spans.append(range(len(self._full), len(self._full) + len(found)))
            self._full += found.modules

    def _depths(self, full: int) -> list[int]:
        beside = (
            ""
            if len(self._paths) == 1
            else f" Or name the lists that grow: blocks={self._paths[:1]}; the model has {', '.join(self._paths)}."
        )
        if self.depths is not None:
            if self.depths[-1] >= full:
                raise ArgumentError(
                    f"depths={self.depths} leave nothing to grow to: the model has {full} blocks.{beside}"
                )
            return [*self.depths, full]
        times = 2 ** len(self.stages)
        if full % times:
            raise ArgumentError(
                f"The model's {full} blocks cannot be halved {len(self.stages)} times. Give depths=, such as "
                f"depths={[max(1, full >> i) for i in range(len(self.stages), 0, -1)]}, or other stages.{beside}"
            )
        return [full >> i for i in range(len(self.stages), -1, -1)]

    def _refuse(self, lists: list[Blocks]) -> None:
        for found in lists:
            if found.shared:
                raise ArgumentError(
                    f"The blocks at {found.path!r} share {found.shared[0]!r}: one cannot be trained without the other. "
                    "Stacking needs blocks with weights of their own."
                )
            if not operators.copyable(found):
                raise ArgumentError(
                    f"The blocks at {found.path!r} differ in class or shape: none can be copied to another."
                )
            if self.operator == "identity":
                operators.check_identity(found[-1])
        for old, new in zip(self._plan, self._plan[1:], strict=False):
            operators.check_kinds(self._full, self._sources(old, new))

    def _sources(self, old: Sequence[int], new: Sequence[int]) -> dict[int, int]:
        """New blocks to what they are copied from, each within its own list."""
        found = {}
        for span in self._spans:
            found |= operators.sources([i for i in old if i in span], [i for i in new if i in span], self.operator)
        return found

    def _due(self) -> tuple[int, list[int]] | None:
        """The next growth: its step, and which blocks run then."""
        later = [one for one in zip(self.steps, self._plan[1:], strict=True) if len(one[1]) > len(self.active)]
        return later[0] if later else None

    def _grow(self, trainer: Trainer, pl_module: LightningModule, active: list[int]) -> None:
        old, sources = self.active, self._sources(self.active, active)
        if self.form == "growth":
            self._apply(pl_module, active)
        origin = operators.copy_blocks(self._full, sources, identity=self.operator == "identity")
        kept = origin if self.optimizer_state == "copy" else {}
        if self.form == "growth":
            self.run.rebuild(kept)
        else:
            self._apply(pl_module, active)
            growth.rewrap(trainer)
            for optimizer in trainer.optimizers:
                transplant(optimizer, optimizer, kept)
        if self.optimizer_state == "reset_all":
            for optimizer in trainer.optimizers:
                forget_state(optimizer)
        rank_zero_info(f"Stacking: {len(old)} -> {len(active)} blocks at optimizer step {self.progress.steps}.")

    def _apply(self, pl_module: LightningModule, active: list[int]) -> None:
        """Let these blocks run and no others. Weights that appear are yet to be filled."""
        self.active = list(active)
        dormant = self._dormant()
        if self.form == "growth":
            for block in dormant:
                _free(block)
            for span, container in zip(self._spans, self._containers, strict=True):
                trained = next(self._full[i] for i in span if not _is_free(self._full[i]))
                now = [self._full[i] for i in active if i in span]
                for block in now:
                    _materialize(block, trained)
                operators.replace_modules(container(), now)
        else:
            for span in self._spans:  # each list has a form of its own
                interceptor.attach(self._full[span.start : span.stop], RECORD.name)
            for i, block in enumerate(self._full):
                interceptor.put(block, RECORD.name, *([] if i in active else [interceptor.Skip()]))
            compat.leave_out_of_ddp(pl_module, dormant)

    def _dormant(self) -> list[nn.Module]:
        return [block for i, block in enumerate(self._full) if i not in self.active]


def _free(block: nn.Module) -> None:
    """Let go of a block's weights and keep everything else: its index, its buffers, its hyper-parameters."""
    _exchange(block, {p: nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in block.parameters()})


def _is_free(block: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in block.parameters())


def _materialize(block: nn.Module, like: nn.Module) -> None:
    """Give a freed block weights again, without values, where and as the block ``like`` has them."""
    if not _is_free(block):
        return
    pairs = operators.pairs(block, like)
    _exchange(block, {p: nn.Parameter(torch.empty_like(other), other.requires_grad) for p, other in pairs})
    buffers = dict(like.named_buffers())
    for name, buffer in block.named_buffers():
        buffer.data = buffer.to(buffers[name])


def _exchange(block: nn.Module, new: dict[nn.Parameter, nn.Parameter]) -> None:
    for module in block.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            setattr(module, name, new[parameter])


def _times(stages: Sequence[float]) -> list[float] | list[int]:
    # A YAML file or a command line gives 5000 as 5000.0.
    times = [int(stage) if stage >= 1 and stage == int(stage) else float(stage) for stage in stages]
    shares = all(0 < time < 1 for time in times)
    steps = all(type(time) is int for time in times)
    if not times or not (steps or shares) or times != sorted(set(times)):
        raise ArgumentError(
            f"stages={list(stages)} are no times of growth: give rising shares of the run between 0 and 1, as "
            "[0.125, 0.3], or rising numbers of optimizer steps, as [5000, 12000]."
        )
    return times


def _check_depths(depths: Sequence[int] | None, stages: list[float] | list[int]) -> None:
    if depths is None:
        return
    depths = list(depths)
    if not all(type(depth) is int and depth >= 1 for depth in depths) or depths != sorted(set(depths)):
        raise ArgumentError(f"depths={depths} do not rise from 1 block or more. Give the depth before each growth.")
    if len(depths) != len(stages):
        raise ArgumentError(f"depths={depths} and stages={stages}: give one depth for each growth, the one before it.")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ArgumentError(f"{name}={value!r} is none of: {', '.join(allowed)}.")
