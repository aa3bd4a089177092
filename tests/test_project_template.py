"""The template of a training project: what it bakes passes its tests and trains, with techniques, as it stands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("cookiecutter")

REPO = Path(__file__).parents[1]
TEMPLATE = REPO / "templates/project/{{cookiecutter.folder}}"
TINY = "--steps 8 --layers 4 --width 32 --length 32 --batch 4 --threads 1 --accelerator cpu".split()


def run(*command, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baked")
    run(
        sys.executable,
        "-m",
        "eke",
        "new",
        "project",
        "--no-input",
        "--output",
        folder,
        "--set",
        "project=My Model",
        cwd=folder,
    )
    return folder / "my-model"


def test_it_bakes_the_files_that_run_in_place_unchanged(project):
    baked = {path.relative_to(project).as_posix() for path in project.rglob("*") if path.is_file()}
    assert baked == {
        *(".gitignore", "Makefile", "README.md", "requirements.txt"),
        *("train.py", "model.py", "data.py", "report.py", "tests/test_train.py"),
        *("finetune.py", "instructions.py", "tests/test_finetune.py"),
    }
    for name in baked - {"README.md"}:
        assert (project / name).read_text() == (TEMPLATE / name).read_text(), name
    assert (project / "README.md").read_text().startswith("# My Model\n")
    assert "cookiecutter" not in (project / "README.md").read_text()


def test_its_own_tests_pass(project):
    out = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", cwd=project)
    assert " passed" in out
    assert "failed" not in out


def test_its_first_training_compares_the_three_runs_and_leaves_table_and_picture(project):
    out = run(sys.executable, "train.py", *TINY, cwd=project)
    report = json.loads((project / "runs/1/train.json").read_text())
    plain, recipe, smaller = report["runs"]
    assert (plain["name"], recipe["name"], smaller["name"]) == ("plain", "recipe", "smaller")
    assert recipe["recipe"]
    assert [step for step, _, _ in plain["curve"]] == list(range(1, 9))
    assert (project / "runs/1/train.png").read_bytes().startswith(b"\x89PNG")
    assert report["verdict"][1] in out
    for column in ("weights", "time", "steps", "second", "MiB", "nats/", "bits/", "to plain's"):
        assert column in out, column


def test_an_option_that_a_technique_does_not_take_gets_one_line(project):
    command = [sys.executable, "train.py", "--recipe", "stacking:no_such_option=1", "--out", "refused"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=project)
    assert done.returncode == 2
    assert done.stderr.startswith("train.py: stacking: got an unexpected keyword argument 'no_such_option'. It takes: ")
    assert done.stderr.count("\n") == 1
    assert not (project / "refused").exists()
