"""``eke new``: write a technique or a project from a template."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from eke.spec import EkeError


def bake(template: str, output: str | Path, answers: list[str], *, ask: bool) -> Path:
    """Write a template into a new folder and return the folder.

    Args:
        template: ``"technique"`` or ``"project"``.
        output: Folder to put the new folder into.
        answers: ``key=value`` each, for the template's questions.
        ask: Ask at the terminal for what ``answers`` leave open; otherwise take the defaults.

    Raises:
        EkeError: cookiecutter is missing, an answer the template has no question for, or one it refuses.
    """
    try:
        from cookiecutter.exceptions import CookiecutterException, FailedHookException, OutputDirExistsException
        from cookiecutter.main import cookiecutter
    except ImportError:
        raise EkeError("eke new needs cookiecutter. Install it: pip install 'eke[new]'") from None
    source = folder(template)
    context = _context(source, answers)
    if ask:
        try:
            context = _asked(source, context)
        except EOFError:
            print()  # the question stands there without an answer
            raise EkeError("there is nobody to ask: add --no-input, and --set key=value for what matters.") from None
    with tempfile.TemporaryDirectory() as scratch:
        # Compiled files lie in a template that was installed or run in place, and would be copied along.
        clean = shutil.copytree(source, Path(scratch) / template, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        try:
            return Path(cookiecutter(str(clean), no_input=True, extra_context=context, output_dir=str(output)))
        except OutputDirExistsException as error:
            raise EkeError(f"{error}. Remove it, or give another --output.") from None
        except FailedHookException:
            raise EkeError("the template refused an answer, for the reason above. Nothing was written.") from None
        except (CookiecutterException, ValueError) as error:
            raise EkeError(f"{' '.join(str(error).split())}") from None


def folder(template: str) -> Path:
    """Where a template lies: in the installed package, or at the top of the checkout of an editable install."""
    package = Path(__file__).parents[1]
    for place in (package / "_templates" / template, package.parents[2] / "templates" / template):
        if (place / "cookiecutter.json").exists():
            return place
    raise EkeError(f"the {template} template is not in this installation of eke. Install it again: pip install eke")


def _context(source: Path, answers: list[str]) -> dict[str, str]:
    defaults = json.loads((source / "cookiecutter.json").read_text())
    questions = [key for key in defaults if not key.startswith("_")]
    context = {}
    for answer in answers:
        key, equals, value = answer.partition("=")
        if not equals:
            raise EkeError(f"--set {answer}: write key=value.")
        if key not in questions:
            raise EkeError(f"--set {answer}: the template has no {key!r}. It asks for: {', '.join(questions)}.")
        if isinstance(defaults[key], list) and value not in defaults[key]:
            raise EkeError(f"--set {answer}: {key} is one of {', '.join(defaults[key])}.")
        context[key] = value
    return context


def _asked(source: Path, context: dict[str, str]) -> dict[str, str]:
    """The answers with those of a person added. Cookiecutter itself would ask again for what is given already."""
    from cookiecutter.prompt import read_user_choice, read_user_variable, render_variable
    from cookiecutter.utils import create_env_with_context

    questions = json.loads((source / "cookiecutter.json").read_text())
    environment, prompts = create_env_with_context({"cookiecutter": questions}), questions.get("__prompts__", {})
    answers, total = {}, sum(not key.startswith("_") for key in questions) - len(context)
    for key in (key for key in questions if not key.startswith("_")):
        if key in context:
            answers[key] = context[key]
            continue
        place = f"  [dim][{len(answers.keys() - context.keys()) + 1}/{total}][/] "
        default = render_variable(environment, questions[key], answers)  # may follow from earlier answers
        ask = read_user_choice if isinstance(default, list) else read_user_variable
        answers[key] = ask(key, default, prompts, place)
    return answers
