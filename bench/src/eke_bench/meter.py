"""What one training run costs: wall time, CPU time, normalized cost, FLOPs, memory, energy.

The normalized cost survives a noisy machine (Kaddour et al. 2023, "No Train No Gain", Reference System Time). Between
the steps of the run, every few of them, a *probe* runs: one training step of the workload's plain reference model. What
the run's steps cost is taken as a multiple of the probes next to them, so that a neighbour who slows the machine down
slows both. Steps are sorted by kind (how many blocks ran, how many tokens came), each kind has the median of its
multiples, and the normalized cost is the number of steps of each kind times that: cost in steps of the reference model.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from eke import measure
from torch import nn
from torch.optim import Optimizer

from eke_bench.energy import joules


@dataclass
class Kind:
    """Steps that cost the same."""

    steps: int = 0
    timed: int = 0
    wall: float = 0.0
    cpu: float = 0.0
    multiples: list[float] = field(default_factory=list)  # of a probe, one for each window
    flops: int | None = None
    memory: dict[str, int] | None = None


class Meter:
    """Told when steps begin and end, by whoever trains. What happens in a pause is charged to nobody.

    Args:
        probe: Runs one step of the reference model. It must draw no random numbers.
        every: Steps between probes.
        device: Where training runs. On CUDA each mark waits for the device.
        count: Count FLOPs and memory of one step of each kind, in a pause.
    """

    def __init__(self, probe: Callable[[], Any], *, every: int = 10, device: str = "cpu", count: bool = True) -> None:
        self.kinds: dict[str, Kind] = {}
        self.curve: list[dict[str, Any]] = []
        self.probes: list[float] = []
        self._probe, self._every, self._count = probe, every, count
        self._cuda = torch.device(device).type == "cuda"
        self._mark: tuple[float, float] | None = None
        self._spent = [0.0, 0.0]  # since the last step ended, pauses left out
        self._window: dict[str, list[float]] = {}  # kind to costs of its steps since the last probe
        self._counted = 0
        self._energy: list[float] = []

    # ------------------------------------------------------------------ told by the trainer

    def start(self) -> None:
        """The run begins."""
        self._run_probe()  # the first one warms up
        self.probes.clear()
        self._run_probe()
        self._energy = [joules(self._cuda) or 0.0] if joules(self._cuda) is not None else []
        self.resume()

    def pause(self) -> None:
        """Stop all clocks: evaluation, counting, a probe."""
        if self._mark is not None:
            now = self._now()
            self._spent = [spent + now[i] - self._mark[i] for i, spent in enumerate(self._spent)]
            self._mark = None

    def resume(self) -> None:
        self._mark = self._now()

    def step(self, kind: str = "") -> None:
        """A step of this kind has ended."""
        self.pause()
        found = self.kinds.setdefault(kind, Kind())
        found.steps += 1
        if self.total > 1:  # the first step compiles, loads and allocates
            found.timed += 1
            found.wall += self._spent[0]
            found.cpu += self._spent[1]
            self._window.setdefault(kind, []).append(self._spent[0] if self._cuda else self._spent[1])
        else:
            self.first = tuple(self._spent)
        self._spent = [0.0, 0.0]
        if self.total % self._every == 0:
            self._close_window()
        self.resume()

    @property
    def total(self) -> int:
        """Steps done."""
        return sum(kind.steps for kind in self.kinds.values())

    def wants_count(self) -> bool:
        """Whether the coming step should run inside :meth:`counting`: there is a kind whose counts are not known."""
        if not self._count or not self.total or self._counted >= max(4, self.total // 10):
            return False
        return any(kind.flops is None for kind in self.kinds.values())

    @contextmanager
    def counting(self, module: nn.Module, *optimizers: Optimizer) -> Iterator[Callable[[str], None]]:
        """Count one step, in a pause; it then counts as one of its kind.

        Yields:
            To be told the kind, once it is known.
        """
        self.pause()
        self._counted += 1
        told: list[str] = []
        try:
            with ExitStack() as stack:
                # Compiled code neither compiles nor runs under a dispatch mode.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
                if self._cuda:
                    torch.cuda.reset_peak_memory_stats()
                    memory: dict[str, int] = {}
                else:
                    memory = stack.enter_context(measure.tracked_memory(module, *optimizers))
                flops = stack.enter_context(measure.count_flops())
                yield told.append
        finally:
            self._spent = [0.0, 0.0]
        if not told:  # the step failed, and its own error is the one to be seen
            return
        found = self.kinds.setdefault(told[0], Kind())
        found.steps += 1
        found.flops = flops["flops"]
        found.memory = {"total": torch.cuda.max_memory_allocated()} if self._cuda else memory
        if self.total % self._every == 0:
            self._close_window()
        self.resume()

    def evaluated(self, **metrics: float) -> None:
        """Held-out measures after the steps so far. Call it inside a pause."""
        wall, cpu = self._charged()
        now = {"step": self.total, "wall_s": wall, "cpu_s": cpu, **metrics}
        self.curve.append({**now, "kinds": {name: kind.steps for name, kind in self.kinds.items()}})

    def stop(self) -> None:
        """The run has ended."""
        self.pause()
        if self._window:
            self._close_window()
        if self._energy and (now := joules(self._cuda)) is not None:
            self._energy.append(now)

    # ------------------------------------------------------------------ what came out

    def result(self) -> dict[str, Any]:
        """Accounts, curve and kinds of steps, ready for JSON. A count that could not be made is None."""
        wall, cpu = self._charged()
        multiples = {name: _median(kind.multiples) for name, kind in self.kinds.items()}
        flops = {name: kind.flops for name, kind in self.kinds.items()}
        steps = {name: kind.steps for name, kind in self.kinds.items()}
        multiples, flops = _filled(multiples, steps), _filled(flops, steps)
        memory = [kind.memory for kind in self.kinds.values() if kind.memory is not None]
        curve = []
        for point in self.curve:
            done = point.pop("kinds")
            curve.append({**point, "normalized_cost": _total(done, multiples), "flops": _total(done, flops)})
        return {
            "costs": {
                "steps": self.total,
                "wall_s": wall,
                "cpu_s": cpu,
                "normalized_cost": _total(steps, multiples),
                "flops": _total(steps, flops),
                "memory": max(memory, key=lambda causes: causes["total"], default=None),
                "energy_j": self._energy[1] - self._energy[0] if len(self._energy) == 2 else None,
                "first_step_s": self.first[0] if self.total else None,
            },
            "curve": curve,
            "kinds": {
                name: {
                    "steps": kind.steps,
                    "wall_s": kind.wall / kind.timed if kind.timed else None,
                    "cpu_s": kind.cpu / kind.timed if kind.timed else None,
                    "normalized_cost": multiples[name],
                    "spread": _quartiles(kind.multiples),
                    "flops": kind.flops,
                    "memory": kind.memory,
                }
                for name, kind in self.kinds.items()
            },
            "probe_s": {"median": statistics.median(self.probes), "spread": _quartiles(self.probes)},
        }

    def _charged(self) -> tuple[float, float]:
        """Wall and CPU seconds; steps that were not timed count as the mean of their kind, or of all."""
        timed = max(1, sum(kind.timed for kind in self.kinds.values()))
        sums = []
        for clock in ("wall", "cpu"):
            mean = sum(getattr(kind, clock) for kind in self.kinds.values()) / timed
            sums.append(
                sum(
                    kind.steps * (getattr(kind, clock) / kind.timed if kind.timed else mean)
                    for kind in self.kinds.values()
                )
            )
        return sums[0], sums[1]

    def _close_window(self) -> None:
        before = self.probes[-1]
        self._run_probe()
        beside = (before + self.probes[-1]) / 2
        for name, costs in self._window.items():
            self.kinds[name].multiples.append(statistics.fmean(costs) / beside)
        self._window = {}

    def _run_probe(self) -> None:
        wall, cpu = self._now()
        self._probe()
        later = self._now()
        self.probes.append(later[0] - wall if self._cuda else later[1] - cpu)

    def _now(self) -> tuple[float, float]:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


def _filled(each: dict[str, Any], steps: dict[str, int]) -> dict[str, Any]:
    """Costs of kinds, those of rare ones filled with the mean.

    A kind that came up once or twice, such as the very first step of a schedule, may have been neither timed nor
    counted. Up to a hundredth of the steps, or one, that is no reason to know nothing of the others.
    """
    known = {name: cost for name, cost in each.items() if cost is not None}
    unknown = sum(steps[name] for name in each if name not in known)
    if not known or unknown > max(1, sum(steps.values()) // 100):
        return each
    mean = sum(steps[name] * cost for name, cost in known.items()) / sum(steps[name] for name in known)
    return {name: known.get(name, mean) for name in each}


def _total(steps: dict[str, int] | Counter[str], each: dict[str, Any]) -> Any:
    """Sum of number times cost; None when the cost of a kind that occurred is not known."""
    if any(each[name] is None for name, number in steps.items() if number):
        return None
    return sum(number * each[name] for name, number in steps.items())


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _quartiles(values: list[float]) -> list[float] | None:
    if len(values) < 2:
        return None
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]
