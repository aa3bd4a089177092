"""The effect report: on the user's own run, what does each technique give, and how busy is the machine?

A technique that acts on the model alone and does not change the mathematics can be switched off for a few steps and on
again. That is done in short blocks, off and on in turn, so that a machine which slows down slows both. Any other is
measured at the end, in short runs of copies of the model, with it and without it in turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from statistics import fmean, median
from typing import Any, ClassVar

import eke
import torch
from eke import ArgumentError, EkeError, Run, Technique, TechniqueCallback, measure
from eke.quiet import quiet
from eke.seams.batch import tensors
from eke.seams.trial import clock, compare, compiled, switch_off, switch_on, turns
from eke.strategies import arguments_of
from lightning.pytorch import LightningModule, Trainer

from eke_report.copies import Copies
from eke_report.entry import RECORD
from eke_report.text import render

RUN = ("run", None)
BLOCKS = len(turns(0))
BUILT_IN = (
    "initialize",
    "alter_optimizer",
    "alter_schedulers",
    "alter_loader",
    "begin_samples",
    "manifest",
    "shape_from",
    "alter_checkpoint",
    "eval_weights",
)


class Report(TechniqueCallback):
    """Reports at the end of ``fit``: on the terminal, as ``effects.json``, and to the Trainer's loggers.

    Example::

        trainer = Trainer(callbacks=[Stacking(), Adam8bit(), Report()])

    Args:
        start: Optimizer steps before it begins to switch: what compiles and allocates should have done so.
        rounds: Of switching each technique off and on. Each takes four blocks.
        block: Batches in a block, of which the first is not timed.
        pairs: Rounds of runs of copies for each technique that cannot be switched, four runs each; 0 makes none.
        pair_steps: Optimizer steps of a copy's run, of which neither the first is timed nor the last, whose memory is
            counted.
        ceilings: Measure the machine's best matrix product at the end, for about a second, to give a utilization.
        file: Name of the JSON file in the logger's folder, or in ``default_root_dir``; ``""`` writes none.

    Raises:
        ValueError: a number that leaves nothing to time.
    """

    technique: ClassVar[Technique] = RECORD
    writes_files: ClassVar[bool] = True

    def __init__(
        self,
        *,
        start: int = 20,
        rounds: int = 5,
        block: int = 4,
        pairs: int = 2,
        pair_steps: int = 12,
        ceilings: bool = True,
        file: str = "effects.json",
    ) -> None:
        if start < 2 or rounds < 2 or block < 2:
            raise ArgumentError(
                f"start={start}, rounds={rounds}, block={block} leave nothing to compare: each has to be 2 or more."
            )
        if pairs == 1 or pairs < 0 or pair_steps < 4:
            raise ArgumentError(
                f"pairs={pairs}, pair_steps={pair_steps}: give 2 rounds or more, or 0 for none, of 4 steps or more."
            )
        self.start, self.rounds, self.block, self.ceilings, self.file = start, rounds, block, ceilings, file
        self.pairs, self.pair_steps = pairs, pair_steps
        self._copies: Copies | None = None
        self._no_copies = ""  # why there are none
        self.result: dict[str, Any] | None = None
        self._clear()

    def _clear(self) -> None:
        self._steps: list[float] = []  # seconds of ordinary batches
        self._waits: list[float] = []  # seconds between two batches
        self._samples = 0
        self._states: dict[str, list[list[float]]] = {}  # technique to rounds of four block means
        self._counts: dict[str, dict[str, Any]] = {}  # "on", or a technique that was off, to FLOPs and memory
        self._why_not: dict[str, str] = {}
        self._switchable: list[TechniqueCallback] = []
        self._script: list[tuple[str, Any]] = []  # what is still to be done, the next at the end
        self._off: TechniqueCallback | None = None
        self._began = self._ended = None
        self._counting: ExitStack | None = None
        self._block: list[float] = []

    # ------------------------------------------------------------------ a run

    def check(self, run: Run) -> None:
        self._copies, self._no_copies = None, ""
        techniques = [one for one in eke.techniques(run.trainer) if one is not self] if run.fitting else []
        fixed = [one for one in techniques if _fixed(one, run.module) and not type(one).writes_files]
        if not fixed:
            return
        if self.pairs == 0:
            self._no_copies = "pairs=0 asks for no runs of copies"
        elif run.world_size > 1:
            self._no_copies = f"the run has {run.world_size} processes, and copies would have one"
        else:
            try:
                self._copies = Copies(run.trainer, run.module, techniques, self.pair_steps)
            except Exception as error:
                self._no_copies = f"{type(run.module).__name__} or a technique cannot be copied: {error}"

    def alter_loader(self, run: Run, loader: Any) -> Any:
        if self._copies is not None:
            self._copies.take_data(loader)
        return loader

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clear()
        self.result = None
        for technique in eke.techniques(trainer):
            if technique is not self:
                reason = _fixed(technique, pl_module)
                if reason is None:
                    self._switchable.append(technique)
                else:
                    self._why_not[type(technique).technique.name] = reason
        for part in (trainer.strategy, trainer.precision_plugin):
            if (record := getattr(type(part), "technique", None)) is not None:
                self._why_not[record.name] = "it is part of the Trainer for the whole run"
        if self._copies is not None:
            try:
                self._copies.take_batches(trainer)
            except EkeError as error:
                self._copies, self._no_copies = None, str(error).rstrip(".")
        # Compiled code cannot run while operators are counted; with several processes a share would be taken for all.
        self._script = [*self._plan(count=trainer.world_size == 1 and not compiled(pl_module))][::-1]
        self._doing: tuple[str, Any] = ("wait", None)
        self._now = clock(pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._began = self._now()
        if self._ended is not None:
            self._waits.append(self._began - self._ended)
        if self._doing is RUN:  # until the end: nothing is switched any more
            return
        if self.progress.at_boundary and self.progress.steps >= self.start and self._done():
            self._doing = self._script.pop() if self._script else RUN
        what, technique = self._doing
        self._switch(technique if what in ("off", "count off") else None, pl_module)
        if what.startswith("count") and _name(technique) not in self._counts:
            self._counting = _counting(pl_module, trainer, self._counts, technique)
        self._began = self._now()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._stop_counting()  # an optimizer may be compiled, which cannot run while operators are counted

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stop_counting()
        self._ended = self._now()
        if self._doing is RUN:
            self._steps.append(self._ended - self._began)
        elif self._doing[0] in ("on", "off"):
            self._block.append(self._ended - self._began)
        self._samples += len(batch) if isinstance(batch, torch.Tensor) else _length(batch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = None  # what comes before the next batch is no waiting for data

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = None
        self._switch(None, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._ended = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_counting()
        self._done()
        self._switch(None, pl_module)
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # all processes take part in finding it
        if trainer.is_global_zero:
            self._publish(trainer, pl_module, folder)

    def end_run(self, run: Run) -> None:
        self._stop_counting()
        self._off = None  # the coordinator restores all of them
        self._copies = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_copies": None}

    # ------------------------------------------------------------------ switching

    def _done(self) -> bool:
        """Whether what is being done has been done for long enough; then keep what was timed."""
        what, technique = self._doing
        if what not in ("on", "off"):
            return True
        if len(self._block) < self.block:
            return False
        rounds = self._states.setdefault(_name(technique), [])
        if not rounds or len(rounds[-1]) == BLOCKS:
            rounds.append([])
        rounds[-1].append(median(self._block[1:]))
        if what == "on":
            self._steps.extend(self._block[1:])
        self._block = []
        return True

    def _plan(self, *, count: bool) -> Iterator[tuple[str, Any]]:
        """What to do with each batch, or block of batches, once the run is warm."""
        if count:
            yield "count on", None
        for technique in self._switchable if count else ():
            yield "count off", technique
        for number in range(self.rounds):
            for technique in self._switchable:
                for state in turns(number):
                    yield state, technique

    def _switch(self, off: TechniqueCallback | None, pl_module: LightningModule) -> None:
        if self._off is off:
            return
        if self._off is not None:
            with quiet(all_warnings=True):
                switch_on(self._off)
        if off is not None:
            switch_off(off)
        self._off = off

    def _stop_counting(self) -> None:
        if self._counting is not None:
            self._counting.close()
            self._counting = None

    # ------------------------------------------------------------------ the report

    def _publish(self, trainer: Trainer, pl_module: LightningModule, folder: Path) -> None:
        self.result = self._conclude(trainer, pl_module)
        for logger in trainer.loggers:
            logger.log_metrics(_flat(self.result), step=trainer.global_step)
        print(f"\n{render(self.result)}", flush=True)
        if self.file:
            print(f"As JSON: {write(self.result, folder / self.file)}", flush=True)

    def _conclude(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        own = self._counts.get("on", {})
        step = median(self._steps) if self._steps else None
        result: dict[str, Any] = {
            "device": str(pl_module.device),
            "precision": str(trainer.precision),
            "processes": trainer.world_size,
            "batches": self.progress.micro_steps,
            "step_s": step,
            "samples_per_s": self._samples / self.progress.micro_steps * trainer.world_size / step
            if step and self.progress.micro_steps
            else None,
            "waiting_for_data": fmean(self._waits) / (fmean(self._waits) + step) if self._waits and step else None,
            "flops_per_step": own.get("flops"),
            "memory": own.get("memory") or _allocated(pl_module),
            "techniques": {},
        }
        if step and own.get("flops") and self.ceilings:
            dtype = "bfloat16" if "16" in str(trainer.precision) else "float32"
            best = measure.ceilings(pl_module.device, seconds=0.3)[dtype]["best"]
            result["ceiling_flops_per_s"] = best
            result["utilization"] = own["flops"] / step / best
        for technique in self._switchable:
            name = type(technique).technique.name
            result["techniques"][name] = self._effect(name)
        for name, reason in self._why_not.items():
            result["techniques"][name] = self._of_copies(name, reason, pl_module)
        return result

    def _of_copies(self, name: str, reason: str, pl_module: LightningModule) -> dict[str, Any]:
        """What a technique gives that was not switched for that reason."""
        if self._copies is not None and name in self._copies.techniques and self.progress.steps >= self.start:
            return self._copies.effect(name, pl_module, self.pairs)
        why = self._no_copies
        if self._copies is not None and self.progress.steps < self.start:
            why = f"the run ended before start={self.start} steps"
        why = f"{reason}, and {why}" if why else reason
        return {"measured": False, "why": f"{why}: what it gives takes paired runs"}

    def _effect(self, name: str) -> dict[str, Any]:
        rounds = [one for one in self._states.get(name, ()) if len(one) == BLOCKS]
        short = f"the run was too short: it ended after {len(rounds)} of {self.rounds} rounds"
        effect = compare(rounds) if len(rounds) > 1 else {"measured": False, "why": short}
        on, off = (self._counts.get(key, {}).get("memory") for key in ("on", name))
        if on and off:
            effect["memory_ratio"] = on["total"] / off["total"]
        return effect


def write(result: dict[str, Any], path: Path) -> Path:
    """Write a report to ``path``, or beside it with ``-1``, ``-2`` in its name: none is overwritten."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in count():
        file = path if number == 0 else path.with_stem(f"{path.stem}-{number}")
        try:
            with file.open("x") as out:
                json.dump(result, out, indent=1)
            return file
        except FileExistsError:
            continue
    raise AssertionError("count() has no end")


def _name(technique: TechniqueCallback | None) -> str:
    return "on" if technique is None else type(technique).technique.name


def _fixed(technique: TechniqueCallback, pl_module: LightningModule) -> str | None:
    """Why a technique cannot be switched off for a few steps; None if it can."""
    exactness = type(technique).technique.exactness_of(arguments_of(technique))
    if exactness not in ("exact", "reordered sums"):
        return f"it changes the mathematics ({exactness})"
    kinds = [name for name in BUILT_IN if getattr(type(technique), name) is not getattr(TechniqueCallback, name)]
    if kinds:
        return f"it is built into the run ({', '.join(kinds)})"
    if type(technique).alter_model is TechniqueCallback.alter_model:
        return "it has nothing to switch"
    if compiled(pl_module):
        return "the model is compiled, and each switch would compile it again"
    return None


def _counting(
    pl_module: LightningModule, trainer: Trainer, counts: dict[str, dict[str, Any]], technique: Any
) -> ExitStack:
    """Count FLOPs and memory until the stack is closed, which happens between backward and the optimizer."""
    stack = ExitStack()
    memory = stack.enter_context(measure.tracked_memory(pl_module, *trainer.optimizers))
    flops = stack.enter_context(measure.count_flops())

    def keep() -> None:
        counts[_name(technique)] = {"memory": memory, "flops": flops["flops"]}

    outer = ExitStack()
    outer.callback(keep)
    outer.push(stack)
    return outer


def _allocated(pl_module: LightningModule) -> dict[str, int] | None:
    """Where it was not counted: the allocator's own peak, of the whole process, on a GPU."""
    return {"total": torch.cuda.max_memory_allocated()} if pl_module.device.type == "cuda" else None


def _length(batch: Any) -> int:
    """Samples in a batch: the length of the first tensor in it."""
    return next((len(one) if one.ndim else 1 for one in tensors(batch)), 0)


def _flat(result: dict[str, Any]) -> dict[str, float]:
    """Numbers for a logger."""
    flat = {
        f"effect/{name}": result.get(name) for name in ("step_s", "samples_per_s", "waiting_for_data", "utilization")
    }
    if result["memory"]:
        flat["effect/peak_memory_bytes"] = result["memory"]["total"]
    for name, effect in result["techniques"].items():
        if effect["measured"]:
            flat[f"effect/{name}/step_time_ratio"] = effect["step_ratio"][0]
        flat[f"effect/{name}/memory_ratio"] = effect.get("memory_ratio")
    return {name: float(value) for name, value in flat.items() if value is not None}
