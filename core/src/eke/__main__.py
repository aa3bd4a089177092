"""Command line: what is installed, what a recipe would do, and new techniques and projects from a template."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.metadata import EntryPoint, version

from eke.cli import others
from eke.spec import EkeError

# Each command imports its own module: `eke list` answers in a fifth of a second because nothing here pulls torch in.


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 where a recipe is refused, 2 where the input is of no use."""
    words = sys.argv[1:] if argv is None else argv
    parser, added = _parser(words)
    try:
        if words and words[0] in added:
            _loading()
            return others.run(added[words[0]], words[1:])
        options = parser.parse_args(words)
        return options.run(options)
    except EkeError as error:
        from eke.cli import columns

        print(columns.paragraph(f"eke: {error}", columns.width(sys.stderr)), file=sys.stderr)
        return 2
    except BrokenPipeError:  # eke list | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser(words: list[str]) -> tuple[argparse.ArgumentParser, dict[str, list[EntryPoint]]]:
    """The parser, and the commands of other distributions, which parse what follows by themselves."""
    parser = argparse.ArgumentParser(prog="eke", description="Techniques for efficient Transformer training.")
    parser.add_argument("--version", action="store_true", help="the version of eke")
    parser.set_defaults(run=_version)
    commands = parser.add_subparsers(metavar="COMMAND")

    command = commands.add_parser("list", help="installed techniques")
    which = command.add_mutually_exclusive_group()
    which.add_argument(
        "--section", metavar="WORD", default="", help="only those of a section of the survey: memory, optimizers, 2.2"
    )
    which.add_argument("--survey", action="store_true", help="what the survey names, and what serves each")
    command.set_defaults(run=_list)

    command = commands.add_parser("info", help="one technique: record, arguments, exceptions, certificate")
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("name", metavar="NAME", nargs="?", help="a technique, as eke list shows it")
    which.add_argument("--effects", action="store_true", help="the words that a record may use, with their definitions")
    command.set_defaults(run=_info)

    command = commands.add_parser("check", help="order and conflicts of a recipe; exit code 1 where it is refused")
    command.add_argument(
        "recipe", metavar="RECIPE", nargs="+", help="words such as stacking adam8bit:block=256, or a YAML file"
    )
    command.set_defaults(run=_check)

    command = commands.add_parser("new", help="a technique or a project from a template")
    command.add_argument("template", choices=["technique", "project"])
    command.add_argument("--output", metavar="DIR", default=".", help="where to write it (default: here)")
    command.add_argument(
        "--set",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="answers to the template's questions, which are not asked then",
    )
    command.add_argument("--no-input", action="store_true", help="ask nothing: take the defaults for the rest")
    command.set_defaults(run=_new)

    added = {name: points for name, points in others.commands().items() if name not in commands.choices}
    for name, points in added.items():
        commands.add_parser(name, help=others.summary(points), add_help=False)
    return parser, added


def _version(options: argparse.Namespace) -> int:
    if not options.version:
        raise EkeError("a command is needed: list, info, check, new, ... `eke --help` tells of each.")
    print(f"eke {version('eke')}")
    return 0


def _list(options: argparse.Namespace) -> int:
    from eke.cli import listing

    if options.survey:
        print(listing.render_survey())
    else:
        print(listing.render(listing.rows(options.section), options.section))
    return 0


def _info(options: argparse.Namespace) -> int:
    from eke.cli import info

    if options.effects:
        print(info.effects())
        return 0
    _loading()
    print(info.render(options.name))
    return 0


def _check(options: argparse.Namespace) -> int:
    from eke.cli import check

    _loading()
    report = check.examine(options.recipe)
    print(check.render(report))
    return 1 if report.refusals else 0


def _loading() -> None:
    """Say to a person at a terminal what takes the seconds that follow."""
    if sys.stderr.isatty() and "torch" not in sys.modules:
        print("eke: loading torch and lightning takes some seconds", file=sys.stderr)


def _new(options: argparse.Namespace) -> int:
    from eke.cli import new

    folder = new.bake(options.template, options.output, options.set, ask=not options.no_input)
    print(f"Wrote {folder}. Its README.md says what to do next.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
