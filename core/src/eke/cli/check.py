"""``eke check``: what a recipe or a LightningCLI file would do, before anything trains."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from eke import compose, recipe, registry
from eke.cli import columns
from eke.spec import ConflictError, EkeError, Technique


@dataclass
class Report:
    """What was found. ``techniques`` stand in the order in which they act, if there is one."""

    techniques: list[Technique] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)  # what stands in the file and is not of Eke
    refusals: list[str] = field(default_factory=list)
    here: list[str] = field(default_factory=list)  # what techniques would take on this machine


@dataclass(frozen=True)
class _Asked:
    """A technique that is asked for, and how to try its arguments."""

    record: Technique
    arguments: dict[str, Any]
    build: Callable[[], object]


def examine(given: list[str]) -> Report:
    """Order, conflicts and argument errors of what ``eke check`` was given.

    Args:
        given: Words of a recipe (see :func:`eke.recipe.parse_words`), or names of YAML files: recipes, or
            configurations of a LightningCLI.

    Raises:
        EkeError: input that cannot be read, a technique that is not installed or does not load.
    """
    files = [one for one in given if one.endswith((".yaml", ".yml"))]
    words = [one for one in given if one not in files]
    asked = _from_recipe(recipe.parse_words(words))
    report, strategy = Report(), None
    for file in files:
        content = recipe.load_yaml(file)
        trainer = _trainer_section(content)
        if trainer is None:
            asked += _from_recipe(recipe.from_mapping(content, file))
        else:
            found, foreign = _from_command_line(trainer, file)
            asked += found
            report.foreign += foreign
            strategy = _lightnings(trainer.get("strategy")) or strategy
    built = []
    for one in asked:
        made, refusals, here = _try(one)
        built += [] if made is None else [made]
        report.refusals += refusals
        report.here += here
    records = [one.record for one in asked]
    try:
        report.techniques = compose.order(records)
    except ConflictError as error:
        report.techniques = records
        report.refusals += compose.conflicts(records) or [str(error)]
    else:
        report.refusals += compose.refusals(built) + _unbearable(built, strategy)
    return report


def render(report: Report) -> str:
    """The report as text."""
    lines: list[tuple[str, int]] = []  # and how far what does not fit in a line is indented
    if report.techniques:
        lines.append(("In the order in which they act:" if not report.refusals else "Asked for:", 0))
        width = max(len(record.name) for record in report.techniques)
        for place, record in enumerate(report.techniques, start=1):
            start = f"  {place}. {record.name.ljust(width)}  "
            lines.append((start + (", ".join(record.effects) or "touches nothing"), len(start)))
            if record.needs:
                lines.append((f"{' ' * len(start)}needs {', '.join(record.needs)}", len(start)))
    lines += [(f"On this machine: {one}", 2) for one in report.here]
    lines += [(f"Not of Eke, order and conflicts unknown: {one}", 2) for one in report.foreign]
    lines += [(f"REFUSED: {one}", 2) for one in report.refusals]
    if not report.techniques:
        lines.append(("No technique of Eke is asked for.", 0))
    elif not report.refusals:
        lines.append(("They go together." if len(report.techniques) > 1 else "Nothing speaks against it.", 0))
    within = columns.width()
    return "\n".join(columns.paragraph(text, within, hang) for text, hang in lines)


def _from_recipe(asked: dict[str, dict[str, Any]]) -> list[_Asked]:
    found = []
    for name, arguments in asked.items():
        record = registry.get(name)
        found.append(_Asked(record, arguments, lambda record=record, given=arguments: record.build(**given)))
    return found


def _unbearable(built: list[object], strategy: object) -> list[str]:
    """What Trainer.fit would refuse because of the strategy: one of the techniques, or Lightning's own."""
    from eke import strategies

    own = next((one for one in built if registry.trainer_argument(one) == "strategy"), strategy)
    return [] if own is None else strategies.refusals(built, own)


def _lightnings(given: Any) -> object:
    """Build the strategy that a LightningCLI file names, such as ``fsdp``; None where it is no one that we know."""
    from lightning.pytorch.strategies import Strategy, StrategyRegistry

    try:
        if isinstance(given, str) and given in StrategyRegistry:
            return StrategyRegistry.get(given)
        path, arguments = (given, {}) if isinstance(given, str) else (given["class_path"], given.get("init_args") or {})
        built = _class(path, "")(**arguments) if "." in path else None
    except Exception:  # one that cannot be built here, for want of a library or of a GPU
        return None
    return built if isinstance(built, Strategy) and not hasattr(type(built), "technique") else None


def _try(asked: _Asked) -> tuple[object, list[str], list[str]]:
    """The object, what is wrong with its arguments, and what the technique would take on this machine."""
    try:
        registry.check_arguments(asked.record, asked.arguments)
        built = asked.build()
        here = built.on_this_machine() if hasattr(built, "on_this_machine") else ""
    except Exception as error:  # what a constructor says about a value, in whatever class it says it
        return None, [_said(asked, error)], []
    return built, [], [f"{asked.record.name} {here}"] if here else []


def _said(asked: _Asked, error: Exception) -> str:
    """One sentence that names the technique, and the arguments where the constructor did not."""
    words = " ".join(str(error).split()) or type(error).__name__
    if not words.startswith(asked.record.name):
        words = f"{asked.record.name}: {words}"
    if asked.arguments and not any(name in words for name in asked.arguments):
        words += f" It was given {', '.join(f'{name}={value!r}' for name, value in asked.arguments.items())}."
    return words


def _trainer_section(content: dict[Hashable, Any]) -> dict[str, Any] | None:
    """The ``trainer:`` part of a LightningCLI configuration, with or without a subcommand; None for a recipe."""
    for part in (content, content.get("fit")):
        if isinstance(part, dict) and isinstance(part.get("trainer"), dict):
            return part["trainer"]
    return None


def _from_command_line(trainer: dict[str, Any], file: str) -> tuple[list[_Asked], list[str]]:
    asked, foreign = [], []
    for argument in ("callbacks", "plugins", "strategy"):
        given = trainer.get(argument) or []
        for item in given if isinstance(given, list) else [given]:
            if isinstance(item, str):  # a short name of Lightning's own, such as strategy: ddp
                path, arguments = item, {}
            elif isinstance(item, dict) and isinstance(item.get("class_path"), str):
                path, arguments = item["class_path"], item.get("init_args") or {}
            else:
                raise EkeError(f"{file}: trainer.{argument} holds {item!r}; a class_path is needed.")
            found = _class(path, file) if "." in path else None
            record = getattr(found, "technique", None)
            if isinstance(record, Technique):
                asked.append(_Asked(record, arguments, lambda found=found, given=arguments: _typed(found, given)))
            elif path != "auto":
                foreign.append(f"{path} ({argument})")
    return asked, foreign


def _class(path: str, file: str) -> type:
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except Exception as error:  # importing someone's module may raise anything
        raise EkeError(f"{file}: class_path {path!r} does not load: {error}") from None


def _typed(found: type, arguments: dict[str, Any]) -> object:
    """Build an object as a LightningCLI would, which turns class names into classes by the annotations."""
    try:
        from jsonargparse import ArgumentParser
    except ImportError:
        return None  # without it there is no LightningCLI either, and plain values could be misjudged
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(found, "built")
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # its name before 4.49
    return instantiate(parser.parse_object({"built": arguments})).built
