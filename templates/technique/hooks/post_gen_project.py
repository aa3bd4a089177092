# Of the three examples, keep the one of this kind.
from pathlib import Path

source, tests = Path("src/{{ cookiecutter.__module }}"), Path("tests")
for kind in ("callback", "plugin", "strategy"):
    if kind != "{{ cookiecutter.kind }}":
        (source / f"{kind}.py").unlink()
        (tests / f"{kind}.py").unlink()
(tests / "{{ cookiecutter.kind }}.py").rename(tests / "test_{{ cookiecutter.__entry }}.py")
