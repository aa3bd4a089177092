"""``eke bench``: run comparisons, show what is stored."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eke import recipe as recipes
from eke import trainer_kwargs
from eke.spec import EkeError

from eke_bench.benchmark import Benchmark, Recipe
from eke_bench.named import Runs
from eke_bench.timing import Timing


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    return _act(_parser().parse_args(arguments), "eke bench")


def main_of(*parts: Benchmark | Timing | Runs, arguments: Sequence[str] | None = None) -> int:
    """The command line of a technique's own ``benchmark.py``."""
    parser = argparse.ArgumentParser(description=f"Measure {', '.join(dict.fromkeys(part.name for part in parts))}.")
    _running(parser)
    parser.add_argument("--show", action="store_true", help="only from what is stored: train nothing")
    parser.add_argument("--only", choices=["timings", "training"], help="leave the other out")
    parser.set_defaults(act=lambda options: _measure(parts, options))
    return _act(parser.parse_args(arguments), "benchmark.py")


def _act(options: argparse.Namespace, program: str) -> int:
    try:
        return options.act(options)
    except (EkeError, ValueError) as error:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: stopped. The same command goes on with the next run.", file=sys.stderr)
        return 130


def _measure(parts: Sequence[Benchmark | Timing | Runs], options: argparse.Namespace) -> int:
    if options.only != "training":
        for timing in (part for part in parts if isinstance(part, Timing)):
            _time(timing, options)
    if options.only != "timings":
        for runs in (part for part in parts if isinstance(part, Runs)):
            _name(runs, options)
        compare([part for part in parts if isinstance(part, Benchmark)], options)
    return 0


def _time(timing: Timing, options: argparse.Namespace) -> None:
    from eke_bench import tables

    stored = Path(options.out) / f"{timing.stem(options.size)}.json"
    if options.show and not stored.exists():
        print(f"{timing.title}: not measured yet.")
        return
    summary = json.loads(stored.read_text()) if options.show else timing.write(options.size, Path(options.out))
    tables.show_timing(summary)


def _name(runs: Runs, options: argparse.Namespace) -> None:
    from eke_bench import tables

    if options.show:
        found = runs.stored(options.size, options.out)
    else:
        found = runs.measure(options.size, options.out, options.seeds, say=lambda text: print(text, flush=True))
    if not found:
        print(f"{runs.title}: not run yet.")
        return
    for rows in runs.tables(found, options.size):
        print(tables.grid_markdown(rows), end="\n\n")
    if runs.draw is not None:
        picture = runs.file(options.size, options.out).with_suffix(".png")
        runs.draw(found, picture)
        print(f"Picture: {picture}")


def compare(benchmarks: Sequence[Benchmark], options: argparse.Namespace) -> int:
    """Run comparisons and write, for each, its summary and its picture beside the results."""
    from eke_bench import pictures, tables
    from eke_bench.analysis import summarize
    from eke_bench.benchmark import measure
    from eke_bench.runner import Runner

    runner = Runner(options.out, options.jobs, say=lambda text: print(text, flush=True), train=not options.show)
    for benchmark in benchmarks:
        results = measure(benchmark, options.size, runner, options.seeds)
        summary = summarize(benchmark, options.size, results)
        stem = Path(options.out) / stem_of(benchmark, options.size)
        stem.parent.mkdir(parents=True, exist_ok=True)
        stem.with_name(stem.name + ".json").write_text(json.dumps(summary, indent=1) + "\n")
        pictures.draw(summary, stem.with_name(stem.name + ".png"))
        tables.show(summary)
        print(f"Summary and picture: {stem}.json and .png")
    return 0


def stem_of(benchmark: Benchmark, size: str) -> str:
    """File name, without ending, of a comparison's summary."""
    return f"{benchmark.name}-{benchmark.workload.replace(':', '.')}-{size}"


def composition(recipe: Recipe, workload: str, shape: Any = None) -> Benchmark:
    """A recipe of several techniques as a ladder, one technique more at each step, and without each of them."""
    names = list(recipe)
    variants: dict[str, Recipe] = {" + ".join(names): recipe}
    for number in range(1, len(names)):
        variants[" + ".join(names[:number])] = {name: recipe[name] for name in names[:number]}
    if len(names) > 2:
        for name in names[:-1]:  # without the last is the ladder's last step but one
            variants[f"without {name}"] = {other: recipe[other] for other in names if other != name}
    return Benchmark("-".join(names), variants, workload, shape=shape or {})


def _run(options: argparse.Namespace) -> int:
    recipe = _recipe(options.recipe)
    try:
        trainer_kwargs(**recipe)  # what does not combine should fail before an hour of baselines
    except TypeError as error:  # an option that the technique does not take
        raise EkeError(str(error)) from None
    if options.ladder and len(recipe) < 2:
        raise EkeError("a ladder needs two techniques or more. Name them, or leave --ladder out.")
    shape = {} if not options.shape else options.shape[0] if options.shape == ["deep"] else _shapes(options)
    if options.ladder:
        return compare([composition(recipe, options.workload, shape)], options)
    label = " + ".join(recipe)
    claim = "same mathematics" if options.same else "changed algorithm"
    return compare([Benchmark("-".join(recipe), {label: recipe}, options.workload, claim, shape=shape)], options)


def _show(options: argparse.Namespace) -> int:
    from eke_bench import pictures, tables

    stored = [json.loads(file.read_text()) for file in sorted(Path(options.out).glob("*.json"))]
    stored = [one for one in stored if isinstance(one, dict)]
    summaries = [one for one in stored if {"rows", "workload", "aa"} <= set(one)]
    timings = [one for one in stored if "timing" in one]
    if not summaries and not timings:
        raise EkeError(f"{options.out} holds no summary. Run a comparison with --out {options.out} first.")
    for summary in [*timings, *summaries]:
        if options.markdown:
            print(f"{summary['name']}\n\n{tables.markdown(summary)}\n")
        else:
            (tables.show_timing if "timing" in summary else tables.show)(summary)
    if not summaries:
        return 0
    picture = Path(options.out) / "profile.png"
    pictures.profile(summaries, picture)
    print(f"Performance profile over the workloads: {picture}")
    return 0


def _list(options: argparse.Namespace) -> int:
    from eke_bench import subjects, tables, workloads

    tables.inventory(
        {name: workloads.load(name, "smoke") for name in workloads.NAMES},
        {name: subjects.missing(name) for name in subjects.NAMES},
    )
    return 0


def _ceilings(options: argparse.Namespace) -> int:
    from eke import measure

    from eke_bench import tables

    tables.ceilings(measure.ceilings(device=options.device))
    return 0


def _recipe(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    if len(words) == 1 and words[0].endswith((".yaml", ".yml")):
        return recipes.load(words[0])
    return recipes.parse_words(words)


def _shapes(options: argparse.Namespace) -> dict[str, dict[str, int]]:
    try:
        return {options.size: {name: int(value) for name, value in (word.split("=") for word in options.shape)}}
    except ValueError:
        raise EkeError(
            f"--shape {' '.join(options.shape)} is no shape. Give name=number, as in blocks=8 width=64, or deep."
        ) from None


def _running(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--size", default="smoke", help="smoke: seconds; cpu: about a minute a run; gpu (default: %(default)s)")
    add("--seeds", type=int, help="runs of each kind (default: the workload's)")
    add("--jobs", type=int, default=1, help="runs at a time, one thread each (default: %(default)s)")
    add("--out", default="benchmarks", metavar="DIR", help="results; what is there is not run again")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="eke bench", description="The standard benchmark of efficient training.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="measure a recipe against its baseline and controls")
    run.add_argument("recipe", nargs="+", metavar="TECHNIQUE", help="name, name:key=value,..., or one YAML file")
    run.add_argument("--workload", default="gpt", help="a name from eke bench list, or package.module:Class")
    run.add_argument("--shape", nargs="+", metavar="NAME=N", help="of the model: deep, or numbers by name")
    run.add_argument("--same", action="store_true", help="claim the same mathematics: losses have to be equal")
    run.add_argument("--ladder", action="store_true", help="add the techniques one by one, and leave out each")
    _running(run)
    run.set_defaults(act=_run, show=False)
    show = commands.add_parser("show", help="tables and the performance profile of stored comparisons")
    show.add_argument("--out", default="benchmarks", metavar="DIR")
    show.add_argument("--markdown", action="store_true", help="print the tables for a README")
    show.set_defaults(act=_show)
    listing = commands.add_parser("list", help="workloads and subjects, and what is missing here")
    listing.set_defaults(act=_list)
    ceilings = commands.add_parser("ceilings", help="the best matrix product and copy of this machine")
    ceilings.add_argument("--device", default="cpu")
    ceilings.set_defaults(act=_ceilings)
    return parser
