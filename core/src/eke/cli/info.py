"""``eke info``: everything a technique says about itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from eke import registry, spec, survey
from eke.cli import certificates, columns
from eke.spec import Technique


def render(name: str) -> str:
    """The technique's record, arguments, exceptions and certificate.

    Raises:
        EkeError: as :func:`eke.get`.
    """
    record = registry.get(name)
    entry, field = registry.installed()[record.name][0], registry.field
    heading = (
        f"{record.name} {field(entry, 'Version')} ({field(entry, 'Name')}): {record.does or field(entry, 'Summary')}"
    )
    heading = columns.paragraph(heading, columns.width(), 2)
    own = [_record(record), _arguments(record), _exceptions(record)]
    return "\n\n".join([heading, *own, _zoo(entry), _certificate(entry)])


def effects() -> str:
    """Every word that a record may use, with its definition."""
    parts = {
        "An effect is a verb and a resource. Verbs": spec.VERBS,
        "Resources, in the order in which a run meets them": spec.RESOURCES,
        "What a strategy imposes; who touches what stands in brackets has to tolerate it": {
            word: f"{definition} ({', '.join(resources)})" for word, (definition, resources) in spec.IMPOSITIONS.items()
        },
        "What becomes of the numbers": spec.EXACTNESS,
        "Where resources are settled: methods of a technique": {
            seam: ", ".join(resources) for seam, resources in spec.SEAMS.items()
        },
    }
    return "\n\n".join(f"{title}\n{_two_columns(list(words.items()))}" for title, words in parts.items())


def arguments(factory: Callable[..., object]) -> list[tuple[str, str]]:
    """Each argument as it is written in the signature, with its line of the docstring."""
    said = _documented(factory)
    return [
        (str(parameter.replace(annotation=inspect.Parameter.empty)), said.get(parameter.name, ""))
        for parameter in inspect.signature(factory).parameters.values()
    ]


def _record(record: Technique) -> str:
    factory = record.resolve()
    lines = [
        ("class", f"{factory.__module__}.{factory.__qualname__}"),
        ("kind", record.kind),
        ("paper", record.paper),
        ("survey", "; ".join(filter(None, [", ".join(record.topics), survey.cited(record.survey)]))),
        ("effects", ", ".join(record.effects)),
        ("needs", ", ".join(record.needs)),
        ("conflicts", "; ".join(f"{other}: {reason}" for other, reason in record.conflicts.items())),
        ("after", ", ".join(record.after)),
        ("exactness", _by_default(record, record.exactness, record.exactness_of)),
        ("tolerates", _by_default(record, record.tolerates, record.tolerated)),
    ]
    if record.kind == "strategy":
        lines.append(("imposes", _by_default(record, record.imposes, record.imposed)))
    return _two_columns([(key, value or "none") for key, value in lines])


def _by_default(record: Technique, words: Any, by: Callable[[dict[str, Any]], tuple[str, ...] | str]) -> str:
    def listed(words: tuple[str, ...] | str) -> str:
        return words if isinstance(words, str) else ", ".join(words)

    if not callable(words):
        return listed(words)
    given = {
        name: parameter.default
        for name, parameter in inspect.signature(record.resolve()).parameters.items()
        if parameter.default is not parameter.empty
    }
    return f"{listed(by(given)) or 'none'}; other arguments may change it"


def _arguments(record: Technique) -> str:
    try:
        lines = arguments(record.resolve())
    except ValueError:  # a factory written in C may have no signature
        return "Arguments: not known"
    return "Arguments\n" + _two_columns(lines) if lines else "Arguments: none"


def _exceptions(record: Technique) -> str:
    if not record.exceptions:
        return "Contract: no exceptions"
    return "Contract, with these exceptions\n" + _two_columns(list(record.exceptions.items()))


def _certificate(entry: Any) -> str:
    try:
        certificate = certificates.read(entry)
    except ValueError as error:
        return f"Certificate: unreadable ({error})"
    if certificate is None:
        return "Certificate: none"
    # Of what was excepted the names: the reasons stand above. What is empty is left out.
    told = {key: list(value) if key == "excepted" else value for key, value in certificate.items()}
    return "Certificate\n" + _two_columns([(key, _plain(value)) for key, value in told.items() if value])


def _zoo(entry: Any) -> str:
    """Which models of the zoo it trains, and of others why not, those of one reason together."""
    try:
        content = certificates.read_zoo(entry)
    except ValueError as error:
        return f"On the zoo's models: unreadable ({error})"
    if content is None:
        return "On the zoo's models: not tried"
    trained: list[str] = []
    others: dict[str, list[str]] = {}
    for name, cell in content["animals"].items():
        if cell["outcome"] == "trains":
            trained.append(f"{name} ({cell['words']})" if cell["words"] else name)
        else:
            others.setdefault(f"{cell['outcome']}: {cell['words']}", []).append(name)
    lines = [("trains", ", ".join(trained) or "none")]
    lines += [(", ".join(names), words) for words, names in others.items()]
    return f"On the zoo's models ({content.get('date', '')[:7]}; docs/zoo.md)\n" + _two_columns(lines)


def _documented(factory: Callable[..., object]) -> dict[str, str]:
    """Argument to its text, from the ``Args:`` section of a docstring, continuation lines joined."""
    texts: dict[str, str] = {}
    lines = (inspect.getdoc(factory) or "").splitlines()
    start = next((i + 1 for i, line in enumerate(lines) if line.strip() == "Args:"), len(lines))
    name, margin = "", None
    for line in lines[start:]:
        if not line.strip():
            continue
        indent = len(line) - len(line.lstrip())
        if indent == 0:  # the next section
            break
        margin = indent if margin is None else margin
        if indent == margin:
            name, _, text = line.strip().partition(":")
            name = name.partition(" ")[0].lstrip("*")  # "block (int): ..." and "**options: ..." as well
            texts[name] = text.strip()
        else:
            texts[name] = f"{texts[name]} {line.strip()}".strip()
    return {name: text.replace("``", "") for name, text in texts.items()}


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return str(value)


def _two_columns(lines: list[tuple[str, str]]) -> str:
    return columns.table([("", key, value) for key, value in lines], columns.width(), shrink=(2,))
