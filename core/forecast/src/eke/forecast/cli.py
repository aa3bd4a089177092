"""``eke forecast``: a step's memory before it is launched, what fits a GPU, and what would make it fit."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eke import recipe, registry
from eke.cli import columns
from eke.forecast.batch import first_size
from eke.forecast.dry_run import Forecast
from eke.forecast.fitting import Change, Setup, largest_batch, make_fit
from eke.forecast.timeline import CAUSES
from eke.quiet import importing
from eke.spec import EkeError

_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9, "G": 2**30}


def main(words: list[str]) -> int:
    """The command: its words to its exit code."""
    parser = argparse.ArgumentParser(prog="eke forecast", description="A step's memory before launch, and what fits.")
    add_arguments(parser)
    return run(parser.parse_args(words))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        metavar="TARGET",
        help="file.py:function or module:function that returns a model and a batch",
    )
    parser.add_argument(
        "recipe", metavar="RECIPE", nargs="*", help="words such as zero:stage=3 adam8bit, or a YAML file"
    )
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes (default: 1)")
    parser.add_argument("--batch", type=int, metavar="N", help="samples of a batch (default: those that TARGET gives)")
    parser.add_argument("--length", type=int, metavar="N", help="tokens of a sample (default: those that TARGET gives)")
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="batches a step (default: 1)")
    parser.add_argument("--precision", default=None, metavar="P", help="the Trainer's, such as bf16-mixed")
    parser.add_argument(
        "--gpu-memory", "--card", type=size, metavar="SIZE", help="such as 80GiB: say what fits into it"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="stacked bars of what was tried")


def run(options: argparse.Namespace) -> int:
    """Print the forecast; 0, or 1 where it does not fit into the GPU's memory and nothing tried makes it."""
    for name in ("ranks", "batch", "length", "accumulate"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise EkeError(f"--{name} {value}: 1 or more is needed.")
    files = [word for word in options.recipe if word.endswith((".yaml", ".yml"))]
    asked = recipe.parse_words([word for word in options.recipe if word not in files])
    for file in files:
        asked.update(recipe.load(file))
    for name, arguments in asked.items():
        registry.check_arguments(registry.get(name), arguments)
    trainer = {"precision": options.precision} if options.precision else {}
    device = "cuda" if options.gpu_memory else "cpu"
    setup = Setup(
        load(options.target), asked, options.ranks, options.batch, options.length, options.accumulate, device, trainer
    )
    given = setup.forecast()
    print(describe(options, given))
    bars: list[tuple[str, Forecast]] = [("as it is", given)]
    fits = True
    if options.gpu_memory:
        samples = options.batch or first_size(setup.build)
        words, more, fits = judge(setup, options.gpu_memory, given, samples)
        print(words)
        bars += [(change.words, change.forecast) for change in more]
    if options.png:
        draw(bars, options.gpu_memory, options.png)
        print(f"Wrote {options.png}.")
    return 0 if fits else 1


def describe(options: argparse.Namespace, found: Forecast) -> str:
    """The forecast as a table."""
    title = f"{options.target}{' with ' + ' '.join(options.recipe) if options.recipe else ''}"
    rows = [("one process of " + str(found.ranks), "peak of a step", "between steps")]
    rows += [(cause, human(found.peak[cause]), human(found.held[cause])) for cause in CAUSES]
    rows.append(("total", human(found.total), human(sum(found.held.values()))))
    count, training = found.parameters
    lines = [title, "", columns.table(rows, None, ()), "", f"{count:,} parameters, of which {training:,} train."]
    if found.host:
        lines.append(f"In CPU memory: {human(found.host)}.")
    return "\n".join(lines)


def judge(setup: Setup, memory: int, given: Forecast, samples: int) -> tuple[str, list[Change], bool]:
    """What fits into a GPU's memory, in words; what was tried for it; and whether anything fits."""
    if given.total <= memory:
        batch, found = largest_batch(setup, memory, given, samples)
        spare, samples = human(memory - given.total), "1 sample" if batch == 1 else f"{batch} samples"
        words = f"Into {human(memory)} of GPU memory it fits, with {spare} to spare."
        return f"{words} The largest batch that fits has {samples}, {human(found.total)}.", [], True
    tried, fitting = make_fit(setup, memory, given, samples)
    rows = [("change", "costs", "peak", "")]
    rows += [(one.words, one.cost, human(one.forecast.total), "fits" if one is fitting else "") for one in tried]
    over = f"Into {human(memory)} of GPU memory it does not fit: {human(given.total - memory)} too much."
    if fitting is None:
        least = min((one.forecast.total for one in tried), default=given.total)
        end = f"Nothing that was tried makes it fit; the least is {human(least)}."
        return "\n".join([over, end, "", columns.table(rows, None, ())]), tried, False
    first = f"The first change that makes it fit, in the order of cost: {fitting.words} ({fitting.cost})."
    return "\n".join([over, first, "", columns.table(rows, None, ())]), tried, True


def load(target: str) -> Callable[[], Any]:
    """The function that a target names.

    Raises:
        EkeError: there is none.
    """
    place, colon, name = target.rpartition(":")
    if not colon or not place:
        raise EkeError(f"{target!r} names no function: write file.py:function or module:function.")
    try:
        with importing():
            module = _module(place)
    except EkeError:
        raise
    except Exception as error:  # someone's file may raise anything
        raise EkeError(f"{place} does not load: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise EkeError(f"{place} has no function {name!r}.")
    return function


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place).resolve()
    if not path.is_file():
        raise EkeError(f"there is no file {place}.")
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def size(text: str) -> int:
    """Bytes of ``"80GiB"``, ``"24 GB"`` or ``"16G"``."""
    match = re.fullmatch(r"([\d.]+)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 80GiB, 24GB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def human(count: int) -> str:
    """Bytes in the unit in which a person thinks of them."""
    for unit, divisor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= divisor:
            return f"{count / divisor:.2f} {unit}"
    return f"{count} B"


COLOURS = {
    "parameters": "#3b6ea5", "gradients": "#7fb3d5", "optimizer": "#8e7cc3", "activations": "#e0a458",
    "temporary": "#b0b0b0",
}  # fmt: skip


def draw(bars: list[tuple[str, Forecast]], memory: int | None, file: Path) -> None:
    """Stacked bars, one for each run, with the GPU's memory as a line.

    Raises:
        EkeError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise EkeError("--png needs matplotlib: pip install 'eke-forecast[png]'.") from None
    figure = Figure(figsize=(8, 1.6 + 0.45 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    names = [name for name, _ in bars]
    left = [0.0] * len(bars)
    largest = max(found.total for _, found in bars)
    unit, name = (2**30, "GiB") if largest >= 2**30 else (2**20, "MiB")
    for cause in CAUSES:
        widths = [found.peak[cause] / unit for _, found in bars]
        axes.barh(range(len(bars)), widths, left=left, label=cause, color=COLOURS[cause], height=0.62)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, (end, (_, found)) in enumerate(zip(left, bars, strict=True)):
        axes.text(end, place, f" {human(found.total)}", va="center", fontsize=8)
    if memory:
        axes.axvline(memory / unit, color="#a33", linewidth=1.2, label=f"GPU memory, {human(memory)}")
    axes.set_yticks(range(len(bars)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.16 * max(largest, memory or 0) / unit)
    axes.set_xlabel(f"peak of a step, {name} in one process")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=6, fontsize=8, frameon=False)
    figure.savefig(file, dpi=130)
