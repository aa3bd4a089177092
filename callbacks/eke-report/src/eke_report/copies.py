"""Short runs of copies: the model and the techniques as a run began with them, with each technique and without it.

For what cannot be switched in mid-run. A copy trains as many steps as it is told, so that whatever goes by a share of
the run comes and goes within them, and nothing of the run itself moves: not its weights, its optimizer, its random
numbers, its loader.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from statistics import fmean, median
from typing import Any

import eke
from eke.quiet import quiet
from eke.seams.calibrate import sample_batches
from eke.seams.state import rng_state, set_rng_state
from eke.seams.trial import compare, interleave
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from eke_report.paired import Watch

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
}


class Copies:
    """Made before anything is touched.

    Args:
        trainer, module: Of the run.
        techniques: Of the run, other than the report.
        steps: Optimizer steps of a copy's run.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, techniques: Iterable[eke.TechniqueCallback], steps: int
    ) -> None:
        self.module = copy.deepcopy(module)
        self.techniques = {
            type(one).technique.name: copy.deepcopy(one) for one in techniques if not type(one).writes_files
        }
        self.batches = steps * trainer.accumulate_grad_batches
        self.data: Any = None
        self.options = {
            **QUIET,
            "max_steps": steps,
            "accelerator": "cpu",
            "devices": 1,
            "precision": trainer.precision,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "gradient_clip_val": trainer.gradient_clip_val,
            "gradient_clip_algorithm": trainer.gradient_clip_algorithm,
        }

    def take_data(self, loader: Any) -> None:
        """Read the samples of a loader by a loader of its own. Streams are left to :meth:`take_batches`."""
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset) and loader.batch_size:
            ordered = isinstance(loader.sampler, SequentialSampler)
            self.data = DataLoader(
                loader.dataset,
                loader.batch_size,
                shuffle=not ordered,
                collate_fn=loader.collate_fn,
                drop_last=loader.drop_last,
            )

    def take_batches(self, trainer: Trainer) -> None:
        """Where there is no such loader: the first batches of the run, drawn aside."""
        if self.data is None:
            count = min(self.batches, int(min(trainer.num_training_batches, self.batches)))
            self.data = _Batches(sample_batches(trainer, count, on_device=False))

    def effect(self, name: str, module: LightningModule, rounds: int) -> dict[str, Any]:
        """What one technique gives, as :func:`eke.seams.trial.compare` says it, with the ratio of the peaks."""
        device = module.device
        self.options |= {"accelerator": "gpu" if device.type == "cuda" else device.type}
        if device.index is not None:
            self.options |= {"devices": [device.index]}
        others = [one for one in self.techniques if one != name]
        peaks: dict[bool, list[int]] = {True: [], False: []}
        random = rng_state()

        def block(with_it: bool) -> float:
            set_rng_state(random)
            watch = self._run([*others, name] if with_it else others)
            if watch.memory:
                peaks[with_it].append(watch.memory)
            return fmean(watch.times)

        try:
            with quiet(all_warnings=True):
                self._run([*others, name])  # compiles, and meets what is made once
                found = compare(interleave(lambda: block(True), lambda: block(False), rounds))
        except Exception as error:
            said = " ".join(str(error).split())
            return {"measured": False, "why": f"copies of the run with it and without it end in an error: {said}"}
        finally:
            set_rng_state(random)
        if all(peaks.values()):
            found["memory_ratio"] = median(peaks[True]) / median(peaks[False])
        return {**found, "copies": self.options["max_steps"]}

    def _run(self, names: list[str]) -> Watch:
        watch = Watch(1)
        callbacks = [watch, *(copy.deepcopy(one) for key, one in self.techniques.items() if key in names)]
        Trainer(callbacks=callbacks, **self.options).fit(copy.deepcopy(self.module), self.data)
        return watch


class _Batches:
    """A loader of these batches. Lightning takes a plain list for several loaders."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)
