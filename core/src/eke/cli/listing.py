"""``eke list``: what is installed. Imports neither torch, lightning nor any technique's package: of each it reads the
metadata and the file that holds its record.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from importlib.metadata import EntryPoint

from eke import registry, survey
from eke.cli import certificates, columns
from eke.spec import KINDS, EkeError, Technique


@dataclass(frozen=True)
class Row:
    """One line of the list."""

    name: str
    version: str
    kind: str
    does: str
    certificate: str


def rows(section: str = "") -> list[Row]:
    """One row for each installed technique, the broken and the twofold among them.

    Args:
        section: Only what belongs there: a part of a title or a topic of the survey, such as ``"memory"``, ``"2.2"``
            or ``"optimizers"``. Empty for all.

    Raises:
        EkeError: the survey has no such section or topic.
    """
    topics = _topics(section) if section else None
    found = []
    for name, claims in registry.installed().items():
        record = registry.peek(claims[0]) if len(claims) == 1 else None
        if topics is None or (record is not None and topics & set(record.topics)):
            found.append(_row(name, claims, record))
    return found


def render(found: list[Row], section: str = "") -> str:
    """A table with aligned columns."""
    if not found:
        return f"Nothing of {section!r} is installed." if section else "No technique is installed."
    lines = [("technique", "version", "kind", "what it does", "certified"), *map(astuple, found)]
    return columns.table(lines, columns.width(), shrink=(3,))


def render_survey() -> str:
    """What the survey names, with what serves each and what nothing serves."""
    serving: dict[str, list[str]] = {}
    for name, entry in registry.available().items():
        record = registry.peek(entry)
        for key in record.survey if record is not None else ():
            serving.setdefault(key, []).append(name)
    lines = [("", "reference", "method", "key", "served by")]
    for section, topics in survey.SECTIONS.items():
        for topic in topics:
            lines.append((f"{section}: {topic}", "", "", "", ""))
            lines += [
                (
                    "",
                    " ".join(f"[{number}]" for number in entry.references),
                    entry.name,
                    entry.key,
                    _served(entry, serving),
                )
                for entry in survey.ENTRIES
                if entry.topic == topic
            ]
    served = {number for key in serving for number in survey.KEYS[key].references}
    return (
        f"{_with_headings(lines)}\n\n{len(serving)} of {len(survey.ENTRIES)} methods, and {len(served)} of "
        f"{len(survey.REFERENCES)} references, are served by what is installed."
    )


def kind(entry: EntryPoint) -> str:
    """The kind that a distribution names among its keywords, ``keywords = ["eke", "callback"]``."""
    keywords = {word.strip() for word in registry.field(entry, "Keywords").split(",")}
    return next((word for word in KINDS if word in keywords), "")


def _row(name: str, claims: list[EntryPoint], record: Technique | None) -> Row:
    entry = claims[0]
    if len(claims) > 1:
        rivals = " and ".join(sorted(registry.field(claim, "Name") for claim in claims))
        return Row(name, "", "", f"DUPLICATE: {rivals} both provide it; uninstall one of them", "")
    version = registry.field(entry, "Version")
    if registry.module_file(entry) is None:
        return Row(name, version, kind(entry), f"BROKEN: its module {entry.module} is not there; install it again", "")
    does = (record.does if record is not None else "") or registry.field(entry, "Summary")
    return Row(name, version, record.kind if record is not None else kind(entry), does, certificates.short(entry))


def _topics(section: str) -> set[str]:
    word = section.lower().removesuffix("s")
    found = {
        topic for title, topics in survey.SECTIONS.items() for topic in topics if word in title.lower() or word in topic
    }
    if not found:
        titles = "; ".join(f"{title}: {', '.join(topics)}" for title, topics in survey.SECTIONS.items())
        raise EkeError(f"the survey has no section {section!r}. A part of one of these is needed: {titles}.")
    return found


def _served(entry: survey.Entry, serving: dict[str, list[str]]) -> str:
    names = ", ".join(serving.get(entry.key, ()))
    return names or (f"({entry.note})" if entry.note else "nothing yet")


def _with_headings(lines: list[tuple[str, ...]]) -> str:
    """The table without its first column, whose cells are lines of their own."""
    text = columns.table([line[1:] for line in lines], columns.width(), shrink=(1, 3)).splitlines()
    blank = iter(line[0] for line in lines if line[0])
    return "\n".join(f"\n{next(blank)}" if not line.strip() else line for line in text)
