"""Facts that hold for every distribution in this repository, read from its files."""

import ast
import re
import sys
from pathlib import Path

import eke
import pytest
from eke.survey import KEYS

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

REPO = Path(__file__).parents[1]
KINDS = {"callbacks": "callback", "plugins": "plugin", "strategies": "strategy"}
TECHNIQUES = sorted(file.parent for kind in KINDS for file in REPO.glob(f"{kind}/*/pyproject.toml"))
FILES = ["pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "benchmark.py"]
SECTIONS = ["What it does", "Arguments", "When not to use it", "Works with", "Source"]
DONE_WITHOUT = {"eke": {"numpy", "transformers"}}  # used where they happen to be installed
IMPORTED_AS = {"nvidia-ml-py": "pynvml", "pyyaml": "yaml"}  # distributions whose import has another name

technique = pytest.mark.parametrize("folder", TECHNIQUES, ids=lambda folder: folder.name)
PARTS = {"core": "eke", "testing": "eke/testing", "forecast": "eke/forecast"}  # of the package eke
CORE = [REPO / "core", REPO / "core/testing", REPO / "core/forecast"]
ALL = [*CORE, REPO / "bench", *TECHNIQUES]
distribution = pytest.mark.parametrize("folder", ALL, ids=lambda folder: folder.name)


def project(folder):
    return tomllib.loads((folder / "pyproject.toml").read_text())["project"]


def stem(folder):
    return folder.name.removeprefix("eke-").replace("-", "_")


def package(folder):
    return folder / "src" / PARTS.get(folder.name, f"eke_{stem(folder)}")


def requirements(folder, extras=True):
    written = project(folder)
    optional = written.get("optional-dependencies", {}).values() if extras else []
    return [*written["dependencies"], *(one for group in optional for one in group)]


def imports(file):
    """Top-level names that a file imports, with whether the import stands at the top of the file."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        else:
            continue
        for name in names:
            yield name.partition(".")[0], node in tree.body


@technique
def test_folder_distribution_import_and_entry_point_have_one_name(folder):
    written = project(folder)
    assert written["name"] == folder.name
    points = written["entry-points"]["eke"]
    assert points[stem(folder)] == f"eke_{stem(folder)}.entry"
    # Two that work on one file may share a distribution; the second's module lies beside the first's.
    assert {module.partition(".")[0] for module in points.values()} == {f"eke_{stem(folder)}"}
    assert (package(folder) / "py.typed").exists()
    assert [path.name for path in (folder / "src").iterdir() if path.is_dir()] == [f"eke_{stem(folder)}"]


@technique
def test_the_kind_is_that_of_the_folder_in_keywords_record_and_file_name(folder):
    kind = KINDS[folder.parent.name]
    assert project(folder)["keywords"] == ["eke", kind]
    assert eke.get(stem(folder)).kind == kind
    assert (package(folder) / f"{kind}.py").exists()


@technique
@pytest.mark.parametrize("file", FILES)
def test_every_technique_has(folder, file):
    assert (folder / file).exists()


@technique
def test_the_changelog_names_the_version(folder):
    assert f"## {project(folder)['version']}" in (folder / "CHANGELOG.md").read_text()


@technique
def test_the_licence_is_that_of_the_repository(folder):
    assert project(folder)["license"] == "Apache-2.0"
    assert (folder / "LICENSE").read_text().strip() == (REPO / "LICENSE").read_text().strip()


@technique
def test_the_readme_has_the_sections_of_the_house_in_their_order(folder):
    lines = (folder / "README.md").read_text().splitlines()
    headings = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    assert [heading for heading in headings if heading in SECTIONS] == SECTIONS
    assert lines[0] == f"# {folder.name}"
    assert f"    pip install {folder.name}" in lines


@technique
def test_the_readme_names_every_argument(folder):
    from eke.cli.info import arguments

    text = (folder / "README.md").read_text().partition("## Arguments")[2].partition("\n## ")[0]
    for argument, _ in arguments(eke.get(stem(folder)).resolve()):
        name = re.match(r"\**(\w+)", argument)[1]
        assert f"`{name}`" in text, f"## Arguments of {folder.name} does not name {name}"


@technique
def test_every_argument_has_its_line_in_the_docstring(folder):
    from eke.cli.info import arguments

    silent = [argument for argument, text in arguments(eke.get(stem(folder)).resolve()) if not text]
    assert not silent


@distribution
def test_every_import_is_declared_and_unconditional_ones_are_no_extras(folder):
    def names(required):
        stems = {re.match(r"[\w.-]+", one)[0].lower() for one in required}
        return {IMPORTED_AS.get(one, one).replace("-", "_") for one in stems}

    always, optional = names(requirements(folder, extras=False)), names(requirements(folder))
    own = package(folder).relative_to(folder / "src").parts[0]
    for file in package(folder).rglob("*.py"):
        if "_templates" in file.parts:
            continue
        # those that a benchmark holds us against are extras as a whole
        subject = (own, file.parent.name) == ("eke_bench", "subjects")
        for name, at_top in imports(file):
            allowed = (always if at_top and not subject else optional) | {own} | sys.stdlib_module_names
            allowed |= set() if at_top else DONE_WITHOUT.get(own, set())
            assert name in allowed, f"{file.relative_to(REPO)} imports {name}, which pyproject.toml does not declare"


@technique
def test_no_technique_imports_or_requires_another(folder):
    others = {f"eke_{stem(other)}" for other in TECHNIQUES if other != folder}
    for file in package(folder).rglob("*.py"):
        assert not others & {name for name, _ in imports(file)}, file
    required = {re.match(r"[\w.-]+", one)[0] for one in requirements(folder)}
    assert not required & {other.name for other in TECHNIQUES}


@technique
def test_the_entry_imports_only_eke(folder):
    assert {name for name, _ in imports(package(folder) / "entry.py")} <= {"eke", "__future__"}


@distribution
def test_dependencies_are_ranges(folder):
    pinned = [one for one in requirements(folder) if re.search(r"===?|~=", one)]
    bare = [one for one in project(folder)["dependencies"] if not re.search(r">=", one)]
    assert not pinned
    assert not bare


@technique
def test_the_ranges_of_the_house_are_kept(folder):
    written = project(folder)["dependencies"]
    assert "eke>=0.1,<1" in written
    assert {"lightning>=2.6", "lightning>=2.6,<2.7"} & set(written)
    assert "torch>=2.10" in written
    assert project(folder)["requires-python"] == ">=3.10"


@technique
def test_record_and_class_point_at_each_other(folder):
    record = eke.get(stem(folder))
    assert isinstance(record.factory, str)
    assert record.factory.partition(":")[0].partition(".")[0] == package(folder).name
    assert record.resolve().technique is record


@technique
def test_names_in_conflicts_and_after_are_those_of_known_techniques(folder):
    record = eke.get(stem(folder))
    known = set(eke.available())  # a distribution may provide several
    assert {*record.conflicts, *record.after} <= known - {record.name}


@technique
def test_each_record_says_in_one_line_what_it_does_and_where_it_belongs(folder):
    for name in project(folder)["entry-points"]["eke"]:
        record = eke.get(name)
        assert 20 < len(record.does) <= 110
        assert not record.does.endswith(".")
        assert record.topics


@technique
def test_the_records_and_the_readme_name_the_same_references_of_the_survey(folder):
    source = (folder / "README.md").read_text().partition("## Source")[2]
    named = {int(number) for number in re.findall(r"\[(\d+)\]", source)}
    records = [eke.get(name) for name in project(folder)["entry-points"]["eke"]]
    keys = {key for record in records for key in record.survey}
    served = {number for key in keys for number in KEYS[key].references}
    assert named == served
    assert {KEYS[key].topic for key in keys} <= {topic for record in records for topic in record.topics}


def test_no_technique_is_left_out_of_the_installed_ones():
    assert {stem(folder) for folder in TECHNIQUES} <= eke.available().keys()
