"""The template of a technique: what it bakes passes the contract before its author writes a line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("cookiecutter")

REPO = Path(__file__).parents[1]
KINDS = [pytest.param(kind, marks=pytest.mark.xdist_group(kind)) for kind in ("callback", "plugin", "strategy")]


def run(*command, **options):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def git_status():
    if not (REPO / ".git").exists():
        pytest.skip("runs in a git checkout")
    # Ours alone: others may work in the same checkout meanwhile.
    paths = ["callbacks", "plugins", "strategies", "requirements.txt", "Makefile", "README.md", "pyproject.toml"]
    return run("git", "status", "--porcelain", "--", *paths, cwd=REPO)


@pytest.fixture(scope="module", params=KINDS)
def baked(request, tmp_path_factory):
    """A baked technique, installed into a folder of its own, and an environment that sees it."""
    folder = tmp_path_factory.mktemp(request.param)
    answers = ["technique=first-try", f"kind={request.param}", "summary=Tries it first"]
    before = git_status()
    run(sys.executable, "-m", "eke", "new", "technique", "--no-input", "--output", folder, "--set", *answers)
    project, site = folder / "eke-first-try", folder / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    run(*install, "--target", site, project)
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    yield request.param, project, environment
    assert git_status() == before, "a new technique changed a file of the repository"


def test_its_tests_pass_before_its_author_writes_a_line(baked):
    _, project, environment = baked
    out = run(
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", project / "tests", cwd=project, env=environment
    )
    assert " passed" in out
    assert "failed" not in out


def test_it_is_listed_and_described_and_checked_without_a_central_edit(baked):
    kind, project, environment = baked
    eke = [sys.executable, "-m", "eke"]
    (line,) = [line for line in run(*eke, "list", env=environment).splitlines() if line.startswith("first_try ")]
    assert line.split() == ["first_try", "0.1.0", kind, "Tries", "it", "first", "none"]
    assert "eke_first_try" in run(*eke, "info", "first_try", env=environment)
    assert "Nothing speaks against it." in run(*eke, "check", "first_try", env=environment)


def test_it_keeps_the_house_style(baked):
    pytest.importorskip("ruff")
    _, project, _ = baked
    run(sys.executable, "-m", "ruff", "check", "--config", REPO / "pyproject.toml", project)


def test_it_has_every_file_of_a_technique_and_no_leftover(baked):
    kind, project, _ = baked
    ignored = {"__pycache__", "build"}
    files = {
        file.relative_to(project).as_posix()
        for file in project.rglob("*")
        if file.is_file() and not ignored & set(file.parts)
    }
    package = "src/eke_first_try"
    assert files == {
        "README.md",
        "benchmark.py",
        "pyproject.toml",
        f"{package}/__init__.py",
        f"{package}/{kind}.py",
        "tests/test_first_try.py",
    }
    for file in files:
        assert "cookiecutter" not in (project / file).read_text()


def test_its_benchmark_measures_it_against_baseline_and_controls(baked, tmp_path):
    _, project, environment = baked
    out = run(sys.executable, project / "benchmark.py", "--out", tmp_path, "--seeds", "1", env=environment)
    assert "first_try on gpt, size smoke, 1 seed" in out
    rows = json.loads((tmp_path / "first_try-gpt-smoke.json").read_text())["rows"]
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert {"baseline", "A/A", "first-try", "smaller, same cost"} <= set(rows)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("technique=TokenDrop", "technique='TokenDrop': use lower-case words joined by hyphens"),
        ("technique=token_drop", "technique='token_drop': use lower-case words joined by hyphens"),
        ("technique=eke-drop", "technique='eke-drop': use lower-case words joined by hyphens, without the eke- prefix"),
        ("class_name=token drop", "class_name='token drop': use capitalized words without spaces"),
        ('summary=A "fast" one', "summary='A \"fast\" one': it goes into quotes in several files."),
    ],
)
def test_an_answer_that_would_not_install_is_refused_and_nothing_written(tmp_path, answer, reason):
    words = ["new", "technique", "--no-input", "--output", tmp_path, "--set", answer]
    done = subprocess.run([sys.executable, "-m", "eke", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 2
    assert reason in done.stderr
    assert list(tmp_path.iterdir()) == []
