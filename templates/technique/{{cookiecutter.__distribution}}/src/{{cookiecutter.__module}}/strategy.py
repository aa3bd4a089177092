"""{{ cookiecutter.summary }}.

Source: {{ cookiecutter.paper }}.

The method here is the template's example: a run on one device computes with a chosen number of CPU threads. Put yours
in its place. For several processes inherit from Lightning's DDPStrategy, FSDPStrategy or ModelParallelStrategy instead;
TechniqueStrategy stays first, which has a resumed run see the data and the random numbers that it would have seen.
"""

from __future__ import annotations

from typing import Any

import torch
from eke import ArgumentError, Technique, TechniqueStrategy
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy


class {{ cookiecutter.class_name }}(TechniqueStrategy, SingleDeviceStrategy):
    """{{ cookiecutter.summary }}.

    Example::

        trainer = Trainer(strategy={{ cookiecutter.class_name }}(threads=2))

    Args:
        threads: CPU threads that torch computes with during the run.
        device: Where the model lies.

    Raises:
        ValueError: ``threads`` is below 1.
    """

    technique = Technique(
        name="{{ cookiecutter.__entry }}",
        kind="{{ cookiecutter.kind }}",
        factory="{{ cookiecutter.__module }}:{{ cookiecutter.class_name }}",
        paper="{{ cookiecutter.paper }}",
        does="{{ cookiecutter.summary }}",
        effects=(),
        exactness="reordered sums",
    )

    def __init__(self, threads: int = 1, device: str = "cpu", **options: Any) -> None:
        if threads < 1:
            raise ArgumentError(f"threads={threads} leaves nobody to compute. Give 1 or more.")
        super().__init__(device, **options)
        self.threads = threads
        self._threads_before: int | None = None

    def setup(self, trainer: Trainer) -> None:
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        super().setup(trainer)

    def teardown(self) -> None:
        # Lightning tears the strategy down after an exception too.
        super().teardown()
        if self._threads_before is not None:
            torch.set_num_threads(self._threads_before)
            self._threads_before = None
