"""Measuring a run while it trains, and showing several side by side."""

from __future__ import annotations

import json
import math
import platform
import time
from contextlib import ExitStack
from importlib.metadata import distributions
from pathlib import Path
from statistics import median

import torch
from eke.compat import MemTracker
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ProgressBar
from rich import progress
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

console = Console()


class Meter(Callback):
    """Charge a run for all it does between first and last step except evaluation, and record its validation loss.

    What is charged, ``cost``, is the process's own CPU seconds on a CPU, which stay nearly the same when other programs
    want the machine too, and seconds by the clock on anything else.
    """

    def __init__(self) -> None:
        self.seconds = self.cost = 0.0
        self.steps = 0  # those on the clock
        self.curve: list[list[float]] = []  # [step, cost, validation loss]
        self.peak_memory = 0
        self._started: tuple[float, float] | None = None
        self._now = time.perf_counter
        self._marks: list[float] = []
        self._tracker: MemTracker | None = None
        self._counting = ExitStack()

    def on_train_start(self, trainer, pl_module) -> None:
        if pl_module.device.type == "cpu":
            self._now = time.process_time
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._start()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._marks.append(self._now())
        # A CPU has no peak counter, and counting slows a step down: the last one is counted, off the clock.
        if pl_module.device.type == "cpu" and trainer.global_step == trainer.max_steps - 1:
            self._stop()
            self._tracker = MemTracker()
            self._tracker.track_external(pl_module, *trainer.optimizers)
            self._counting.enter_context(self._tracker)
            # Compiled code neither compiles nor runs under a dispatch mode: an 8-bit optimizer steps eagerly this once.
            self._counting.enter_context(torch.compiler.set_stance("force_eager"))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if self._tracker is None:
            self.steps += 1
            return
        self._counting.close()
        self.peak_memory = max(parts["Total"] for parts in self._tracker.get_tracker_snapshot("peak").values())
        self._tracker = None

    def on_exception(self, trainer, pl_module, exception) -> None:
        self._counting.close()

    def on_validation_start(self, trainer, pl_module) -> None:
        self._stop()

    def on_validation_end(self, trainer, pl_module) -> None:
        self.curve.append([trainer.global_step, self.cost, float(trainer.callback_metrics["val_loss"])])
        self._start()

    def on_train_end(self, trainer, pl_module) -> None:
        self._stop()
        if pl_module.device.type == "cuda":
            self.peak_memory = torch.cuda.max_memory_allocated()

    def state_dict(self) -> dict:
        return {key: getattr(self, key) for key in ("seconds", "cost", "steps", "curve")}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)

    def cost_per_step(self) -> float:
        """Median over all steps but the first few, which warm up."""
        gaps = [after - before for before, after in zip(self._marks, self._marks[1:], strict=False)]
        return median(gaps[len(gaps) // 4 :])

    def result(self, model: torch.nn.Module, tokens_per_step: int) -> dict:
        loss = self.curve[-1][2]
        return {
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "seconds": self.seconds,
            "cost": self.curve[-1][1],
            "clock": "CPU time" if self._now is time.process_time else "time",
            "tokens_per_second": self.steps * tokens_per_step / self.cost,
            "peak_memory_bytes": self.peak_memory,
            "nats_per_byte": loss,
            "bits_per_byte": loss / math.log(2),
            "curve": self.curve,
        }

    def _start(self) -> None:
        _wait_for_gpu()
        self._started = time.perf_counter(), self._now()

    def _stop(self) -> None:
        if self._started:
            _wait_for_gpu()
            self.seconds += time.perf_counter() - self._started[0]
            self.cost += self._now() - self._started[1]
            self._started = None


class Progress(ProgressBar):
    """One live line a run; where the output is a file, one line an evaluation."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.bar = name, None

    def on_train_start(self, trainer, pl_module) -> None:
        text = progress.TextColumn
        self.bar = progress.Progress(
            text("{task.description:<8}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            text("training loss {task.fields[loss]}"),
            text("validation {task.fields[val]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(self.name, total=trainer.max_steps, loss="", val="")
        self.bar.start()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step % 10 == 0 or trainer.global_step == trainer.max_steps:
            self.bar.update(self.task, completed=trainer.global_step, loss=f"{float(outputs['loss']):.3f}")

    def on_validation_end(self, trainer, pl_module) -> None:
        if not self.bar or "val_loss" not in trainer.callback_metrics:
            return
        loss = f"{float(trainer.callback_metrics['val_loss']):.3f}"
        self.bar.update(self.task, val=loss)
        if not console.is_terminal:
            print(f"{self.name}: step {trainer.global_step} of {trainer.max_steps}, validation loss {loss}", flush=True)

    def on_train_end(self, trainer, pl_module) -> None:
        self.bar.stop()

    def on_exception(self, trainer, pl_module, exception) -> None:
        if self.bar:
            self.bar.stop()


def cost_to(loss: float, curve: list[list[float]]) -> float | None:
    """Cost at which a curve first falls to ``loss``, on a straight line between evaluations; None if it does not."""
    for i, (_, seconds, now) in enumerate(curve):
        if now <= loss:
            _, before, above = curve[i - 1] if i else curve[i]
            return seconds if above == now else before + (seconds - before) * (above - loss) / (above - now)
    return None


def verdict(runs: list[dict]) -> list[str]:
    """What the figures say, in sentences; also when they say that the recipe is not worth it."""
    plain, *others = runs
    if not others:
        return []
    recipe, smaller = others
    lines = []
    reached = cost_to(plain["nats_per_byte"], recipe["curve"])
    if reached is None:
        lines.append(
            f"The recipe did not reach the plain run's final loss: {recipe['nats_per_byte']:.3f} nats a byte "
            f"against {plain['nats_per_byte']:.3f}, in {recipe['cost'] / plain['cost']:.2f} of its time."
        )
    else:
        lines.append(f"The recipe reached the plain run's final loss in {reached / plain['cost']:.2f} of its time.")
    gap = smaller["nats_per_byte"] - recipe["nats_per_byte"]
    model = f"a plain model of {blocks(smaller['layers'])}"
    compared = f"{smaller['nats_per_byte']:.3f} nats a byte against {recipe['nats_per_byte']:.3f}"
    if gap < 0:
        lines.append(
            f"In the recipe's time {model} came lower: {compared}. "
            "At this budget the smaller model is the better buy, unless the depth itself is wanted."
        )
    else:
        lines.append(f"In the recipe's time {model} came no lower: {compared}.")
    lines.append("This is one seed: see --seed before a small difference is believed.")
    return lines


def save_report(report: dict, folder: Path) -> None:
    """Write ``train.json`` and ``train.png``."""
    report["verdict"] = verdict(report["runs"])
    (folder / "train.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report["runs"], report["text"], folder / "train.png")


def print_table(report: dict, folder: Path) -> None:
    runs = report["runs"]
    table = Table(title=report["text"], title_justify="left", title_style="", box=SIMPLE_HEAD, padding=0)
    table.add_column("\nrun", no_wrap=True)
    clock = runs[0]["clock"].replace(" ", "\n") if " " in runs[0]["clock"] else "\n" + runs[0]["clock"]
    figures = ["\nweights", clock, "\nsteps", "tokens/\nsecond", "peak\nMiB", "nats/\nbyte", "bits/\nbyte"]
    for column in [*figures, "to plain's\nloss"]:
        table.add_column(column, justify="right", no_wrap=True)
    for run in runs:
        reached = cost_to(runs[0]["nats_per_byte"], run["curve"])
        table.add_row(
            f"{run['name']}, {blocks(run['layers'])}",
            f"{run['parameters'] / 1e6:.2f} M",
            f"{run['cost']:.1f} s",
            f"{run['steps']:,}",
            f"{run['tokens_per_second']:,.0f}",
            f"{run['peak_memory_bytes'] / 2**20:.1f}",
            f"{run['nats_per_byte']:.3f}",
            f"{run['bits_per_byte']:.3f}",
            "not reached" if reached is None else f"{reached:.1f} s",
        )
    Console(width=max(84, console.width)).print(table)
    print(*report["verdict"], sep="\n")
    print(f"Figures and curves: {folder / 'train.json'} and {folder / 'train.png'}")


def print_sweep(results: list[dict]) -> None:
    best = min(results, key=lambda result: result["nats_per_byte"])
    table = Table("learning rate", "nats/byte", "time", title=f"{blocks(best['layers'])}, {best['steps']} steps")
    for result in results:
        mark = " *" if result is best else ""
        table.add_row(f"{result['lr']:g}{mark}", f"{result['nats_per_byte']:.3f}", f"{result['cost']:.1f} s")
    console.print(table)
    if best in (results[0], results[-1]):
        console.print("The best is at the edge: sweep further before it is used.")


def label(run: dict) -> str:
    return f"{', '.join(run['recipe']) or run['name']}, {blocks(run['layers'])}"


def blocks(layers: int) -> str:
    return "1 block" if layers == 1 else f"{layers} blocks"


def draw(runs: list[dict], title: str, path: Path) -> None:
    """Validation loss against cost, each curve named where it ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    colours = ("#555555", "#d1495b", "#30638e")
    gap = 0.05 * (max(run["curve"][0][2] for run in runs) - min(run["nats_per_byte"] for run in runs))
    right, above = max(run["cost"] for run in runs), float("inf")
    for run, colour in sorted(zip(runs, colours, strict=False), key=lambda pair: -pair[0]["nats_per_byte"]):
        _, seconds, losses = zip(*run["curve"], strict=True)
        axes.plot(seconds, losses, "o-", color=colour, markersize=3, linewidth=1.6)
        above = min(losses[-1], above - gap)  # where two runs end close together, their names must not overlap
        axes.text(right * 1.02, above, f"{label(run)}: {losses[-1]:.3f}", color=colour, va="center")
    axes.hlines(runs[0]["nats_per_byte"], 0, runs[0]["cost"], color="#555555", linewidth=0.8, linestyle=":")
    axes.set(
        xlabel=f"{runs[0]['clock']} of training in seconds, evaluation left out",
        ylabel="validation loss, nats a byte",
        title=title,
    )
    axes.set_xlim(0, right * 1.01)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.4)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def environment() -> dict:
    """What the figures depend on."""
    versions = {dist.name: dist.version for dist in distributions()}
    ours = {name: versions[name] for name in sorted(versions) if name.split("-")[0] in ("torch", "lightning", "eke")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {"device": device, "threads": torch.get_num_threads(), "python": platform.python_version(), **ours}


def _processor() -> str:
    info = Path("/proc/cpuinfo")  # platform.processor() is empty on Linux
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
