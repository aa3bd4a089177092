"""Paired runs: the same model, the same start and the same batches, with a technique and without it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from statistics import fmean, median
from typing import Any

import eke
import torch
from eke import ArgumentError, measure
from eke.seams.state import seed_everything
from eke.seams.trial import clock, compiled, differ
from lightning.pytorch import Callback, LightningModule, Trainer


def paired(
    build: Callable[[], tuple[LightningModule, Iterable[Any]]],
    recipe: Mapping[str, Mapping[str, Any]],
    *,
    steps: int = 40,
    seeds: int = 3,
    warmup: int = 5,
    **trainer: Any,
) -> dict[str, Any]:
    """Measure each technique of a recipe against the same recipe without it.

    For each seed the whole recipe is trained twice, the second time as the A/A control, and once without each
    technique, in an order that turns around from seed to seed.

    Args:
        build: Returns a new model and its training data. Called after the seed was set, so that both are the same each
            time.
        recipe: Technique to its arguments, as for ``eke.trainer_kwargs``.
        steps: Optimizer steps of a run.
        seeds: Repetitions.
        warmup: Steps that are not timed.
        trainer: For ``Trainer``, such as ``accelerator`` and ``precision``.

    Returns:
        Plain data for :func:`eke_report.render`: for each technique ``step_ratio`` as [median, least, most] over the
        seeds, ``memory_ratio`` of the peaks, and ``loss``, the mean of the last tenth of the steps, with and without.

    Raises:
        ValueError: no technique, or too few steps to time.
    """
    if not recipe:
        raise ArgumentError("the recipe is empty: there is nothing to pair. Name one technique or more.")
    if steps < warmup + 2 or seeds < 1:
        raise ArgumentError(f"steps={steps}, warmup={warmup}, seeds={seeds} leave nothing to time. Give more steps.")
    variants = {"": recipe, "again": recipe}
    variants |= {name: {other: recipe[other] for other in recipe if other != name} for name in recipe}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for seed in range(seeds):
        for name in list(variants)[:: -1 if seed % 2 else 1]:
            seed_everything(seed)
            runs[name].append(_train(*build(), variants[name], steps, warmup, trainer))
    control = _ratios(runs["again"], runs[""])
    return {
        "steps": steps,
        "seeds": seeds,
        "control": [min(control), max(control)],
        "pairs": {name: _pair(runs[""], runs[name], control) for name in recipe},
    }


def _train(
    model: LightningModule,
    data: Iterable[Any],
    recipe: Mapping[str, Any],
    steps: int,
    warmup: int,
    given: dict[str, Any],
) -> dict[str, Any]:
    watch = Watch(warmup)
    techniques = eke.trainer_kwargs(**recipe)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, **given, **techniques}
    options["callbacks"] = [watch, *given.get("callbacks", ()), *techniques.get("callbacks", ())]
    Trainer(**{"enable_model_summary": False, "limit_val_batches": 0, **options, "max_steps": steps}).fit(model, data)
    last = watch.losses[-max(1, len(watch.losses) // 10) :]
    return {"step_s": median(watch.times), "memory": watch.memory, "loss": fmean(last)}


class Watch(Callback):
    """Times batches, keeps losses, and tracks the memory of the last batch."""

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.times: list[float] = []
        self.losses: list[float] = []
        self.memory: int | None = None
        self._tracking: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == trainer.max_steps - 1 and not compiled(pl_module) and self.memory is None:
            self._tracking = measure.tracked_memory(pl_module, *trainer.optimizers)
            self._peak = self._tracking.__enter__()
        self._now = clock(pl_module.device)
        self._began = self._now()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if self._tracking is not None:  # an optimizer may be compiled, which cannot be tracked
            self._tracking.__exit__(None, None, None)
            self._tracking, self.memory = None, self._peak["total"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self.warmup and self.memory is None:
            self.times.append(self._now() - self._began)
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, torch.Tensor):
            self.losses.append(float(loss))


def _ratios(with_it: list[dict[str, Any]], without: list[dict[str, Any]]) -> list[float]:
    return [one["step_s"] / other["step_s"] for one, other in zip(with_it, without, strict=True)]


def _pair(with_it: list[dict[str, Any]], without: list[dict[str, Any]], control: list[float]) -> dict[str, Any]:
    ratios = _ratios(with_it, without)
    peaks = [(one["memory"], other["memory"]) for one, other in zip(with_it, without, strict=True)]
    return {
        "step_ratio": [median(ratios), min(ratios), max(ratios)],
        "told_apart": differ(ratios, control),
        "memory_ratio": median(a / b for a, b in peaks) if all(a and b for a, b in peaks) else None,
        "loss": [fmean(one["loss"] for one in with_it), fmean(one["loss"] for one in without)],
    }
