"""Runs what is asked for, once: a result that is stored already is read back, a killed benchmark goes on."""

from __future__ import annotations

import multiprocessing
import os
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any

import torch
from eke import ArgumentError
from eke.spec import EkeError

from eke_bench import store
from eke_bench.meter import Meter
from eke_bench.store import Run, Store
from eke_bench.subjects import Missing
from eke_bench.subjects import load as load_subject
from eke_bench.training import quiet
from eke_bench.workloads import load as load_workload


class Runner:
    """Runs training runs and stores their results.

    Args:
        folder: Of the results.
        jobs: Runs at a time, each in a process of its own with one thread.
        say: Is told of each run that is done.
        train: Whether what is not stored is trained; else it counts as missing.
    """

    def __init__(
        self, folder: str | Path, jobs: int = 1, say: Callable[[str], None] = print, *, train: bool = True
    ) -> None:
        if jobs < 1:
            raise ArgumentError(f"jobs={jobs} runs nothing. Give 1 or more.")
        self.folder, self.jobs, self.say, self.train = Path(folder).resolve(), jobs, say, train

    def __call__(self, runs: Iterable[Run]) -> list[dict[str, Any]]:
        """Results of these runs, in this order. One that fails is stored as such and hinders no other."""
        ids = [(run.id(), run) for run in runs]
        found = {key: self.store(run).find(run) for key, run in dict(ids).items()}
        missing = {key: run for key, run in dict(ids).items() if found[key] is None}
        if not self.train:
            return [found[key] or store.record(run, {"error": "it is not stored"}, "missing") for key, run in ids]
        if missing:
            self.say(f"{len(missing)} of {len(found)} runs to do:")
        for number, (key, result) in enumerate(self._train(missing), start=1):
            run = missing[key]
            if result["status"] != "missing":  # what is not installed may be so tomorrow
                self.store(run).append(result)
            found[key] = result
            self.say(f"  {number}/{len(missing)}  {describe(run)}: {_outcome(result)}")
        return [found[key] for key, _ in ids]

    def store(self, run: Run) -> Store:
        return Store(self.folder, run.workload, run.size)

    def _train(self, missing: dict[str, Run]) -> Iterator[tuple[str, dict[str, Any]]]:
        if self.jobs == 1 or len(missing) < 2:
            for key, run in missing.items():
                yield key, train(run)
            return
        # spawned: a forked process would inherit the threads of whoever called
        with ProcessPoolExecutor(self.jobs, multiprocessing.get_context("spawn")) as pool:
            waiting = {pool.submit(train, run): key for key, run in missing.items()}
            for done in as_completed(waiting):
                yield waiting[done], done.result()


def train(run: Run) -> dict[str, Any]:
    """Train once, on one thread, and return the record."""
    with quiet():
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            subject = load_subject(run.subject)
            workload = load_workload(run.workload, run.size)
            device = "cuda" if run.size == "gpu" else "cpu"
            if device == "cuda" and not torch.cuda.is_available():
                raise EkeError("size 'gpu' needs a CUDA device, and there is none. Use size 'cpu' or 'smoke'.")
            meter = Meter(_probe(run.workload, run.size, device), every=4 if run.size == "smoke" else 10, device=device)
            final = subject.fit(run, workload, meter)
            return store.record(run, {"final": final, "unit": workload.unit, **meter.result()})
        except Missing as error:
            return store.record(run, {"error": str(error)}, "missing")
        except Exception as error:  # one run's failure is a hole in the table, not the end of the others
            said, trace = f"{type(error).__name__}: {error}", traceback.format_exc(limit=-3)
            return store.record(run, {"error": portable(said), "trace": portable(trace)}, "failed")
        finally:
            torch.set_num_threads(threads)


def portable(text: str) -> str:
    """``text`` with files named by where they lie in a package or in the working folder, and not on this machine."""
    places = {*sys.path, sysconfig.get_path("stdlib"), os.getcwd(), tempfile.gettempdir(), str(Path.home())}
    for place in sorted(filter(os.path.isdir, places), key=len, reverse=True):  # the folder before its parent
        if Path(place).is_absolute() and Path(place) != Path(place).parent:
            text = text.replace(f"{place.rstrip(os.sep)}{os.sep}", "")
    return text


@cache
def _probe(workload: str, size: str, device: str) -> Callable[[], None]:
    """One step of the reference model on a batch that stays; the unit of the normalized cost."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if device == "cuda" else []):
        torch.manual_seed(0)
        made = load_workload(workload, size)
        model = made.model(made.size.shape, lr=1e-4, steps=10**9).to(device)
        batch = _to(next(iter(made.train_loader(seed=0))), device)
    optimizer = model.configure_optimizers()["optimizer"]
    draws = _draws(model)

    def step() -> None:
        with torch.random.fork_rng(enabled=draws), torch.enable_grad():
            model.loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


def _draws(model: Any) -> bool:
    """Whether a step of the model draws random numbers, which would shift those of the run."""
    return getattr(model, "draws_random_numbers", False)


def _to(batch: Any, device: str) -> Any:
    from eke_bench.subjects.hand import move

    return move(batch, torch.device(device))


def describe(run: Run) -> str:
    """A run in a few words."""
    shape = " ".join(f"{value} {name}" for name, value in run.shape.items())
    recipe = " + ".join(run.recipe) or "plain"
    again = f", again {run.again}" if run.again else ""
    who = "" if run.subject == "lightning" else f"{run.subject}, "
    budget = f"{run.steps} steps, lr {run.lr:g}, seed {run.seed}{again}"
    return f"{run.workload} {run.size}, {who}{recipe}, {shape}, {budget}"


def _outcome(result: dict[str, Any]) -> str:
    if result["status"] != "ok":
        return f"{result['status']}: {result['error']}"
    costs = result["costs"]
    measures = ", ".join(f"{name} {value:.4f}" for name, value in result["final"].items())
    cost = costs["normalized_cost"]
    steps = "no normalized cost" if cost is None else f"{cost:.1f} reference steps"
    return f"{measures}; {costs['cpu_s']:.1f} s CPU, {steps}"
