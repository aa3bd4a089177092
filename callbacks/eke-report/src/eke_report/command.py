"""``eke report``: print a stored report, or make paired runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from eke.spec import EkeError

EPILOG = "eke report FILE prints a report: effects.json, or a folder that holds one."


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _pairs(words[1:]) if words[:1] == ["pairs"] else _show(words)
    except (EkeError, ValueError, TypeError) as error:
        print(f"eke report: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _show(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="eke report", description="What each technique gave.", epilog=EPILOG)
    parser.add_argument("file", type=Path, metavar="FILE", help="effects.json, or a run's folder; or: pairs --help")
    print(_text(_newest(parser.parse_args(words).file)))
    return 0


def _newest(path: Path) -> Path:
    if not path.exists():
        raise EkeError(f"{path} does not exist. Give an effects.json, or the folder of a run that had Report().")
    if path.is_file():
        return path
    found = sorted(path.rglob("effects*.json"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise EkeError(f"{path} holds no effects.json. Put Report() into callbacks= and run again.")
    return found[-1]


def _text(file: Path) -> str:
    from eke_report.text import render

    try:
        return render(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EkeError(f"{file} is no effect report ({type(error).__name__}: {error}).") from None


def _pairs(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="eke report pairs", description="The same run with each technique and without it, in turn."
    )
    parser.add_argument("build", metavar="MODULE:BUILD", help="function that returns a new model and its training data")
    parser.add_argument("recipe", nargs="+", metavar="TECHNIQUE", help="name, or name:key=value,...")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write it here; an older file is not overwritten"
    )
    options = parser.parse_args(words)
    if options.json and options.json.exists():
        raise EkeError(f"{options.json} exists. Give another name.")
    from eke import recipe as recipes

    from eke_report.paired import paired
    from eke_report.text import render

    result = paired(
        _function(options.build),
        recipes.parse_words(options.recipe),
        steps=options.steps,
        seeds=options.seeds,
        accelerator=options.accelerator,
        precision=options.precision,
        devices=1,
    )
    print(render(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _function(path: str) -> Callable[[], Any]:
    module, _, name = path.partition(":")
    sys.path.insert(0, "")  # a module beside the person who asks
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise EkeError(f"{path} is no function of a module: {error}. Give package.module:function.") from None
