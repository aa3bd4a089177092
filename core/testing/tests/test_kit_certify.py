import json
import subprocess
import sys

import eke.testing.certify
import eke.testing.contract  # noqa: F401  pytester forgets what a run imported, and torch cannot be imported twice
import pytest
from eke.testing import unchanged

pytest_plugins = ["pytester"]

MODULE = """
from eke import Technique, hookimpl
from lightning.pytorch import Callback

RECORD = Technique(name="still", kind="callback", factory="eke_still.entry:Still", exceptions={exceptions})

class Still(Callback):
    technique = RECORD

@hookimpl
def eke_technique():
    return RECORD
"""

# Four short tests of the contract stand for all: certify() reads its list of tests from the class.
CONTRACT = """
import pytest
from eke.testing import CallbackContract
from eke.testing.contract import exercises
from eke_still.entry import Still

class Short(CallbackContract):
    pass

for name in list(Short.items()):
    setattr(Short, name, None)

class TestContract(Short):
    def build(self):
        return Still()

    @classmethod
    def items(cls):
        return ["test_one", "test_two", "test_three"]

    @exercises(strategy="single device", precision="32-true")
    def test_one(self):
        pass

    @exercises(strategy="ddp")
    @pytest.mark.parametrize("number", [1, 2])
    def test_two(self, number):
        {two}

    def test_three(self):
        raise AssertionError("this one cannot hold")
"""

EXCEPTED = {"test_three": "It cannot hold for a method that stands still."}


@pytest.fixture
def package(pytester, monkeypatch):
    def install(exceptions=EXCEPTED, two="pass"):
        info = pytester.path / "eke_still-0.3.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.4\nName: eke-still\nVersion: 0.3\n")
        (info / "entry_points.txt").write_text("[eke]\nstill = eke_still.entry\n")
        home = pytester.path / "eke_still"
        home.mkdir()
        (home / "__init__.py").touch()
        (home / "entry.py").write_text(MODULE.replace("{exceptions}", repr(exceptions)))
        pytester.makepyfile(test_contract=CONTRACT.replace("{two}", two))
        monkeypatch.syspath_prepend(pytester.path)
        return home / "certificate.json"

    return install


def run(pytester, *words):
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", *words, "test_contract.py").stdout.str()


def test_a_contract_that_passes_whole_is_certified_with_what_it_exercised(pytester, package):
    file = package()
    out = run(pytester, "--certify")
    assert f"still: certificate written to {file}" in out
    certificate = json.loads(file.read_text())
    assert certificate["technique"] == "still"
    assert certificate["versions"]["eke-still"] == "0.3"
    assert set(certificate["versions"]) == {"eke-still", "eke", "lightning", "torch"}
    assert certificate["strategies"] == ["single device", "ddp"]
    assert certificate["precisions"] == ["32-true"]
    assert certificate["passed"] == ["test_one", "test_two"]
    assert certificate["excepted"] == EXCEPTED


def test_nothing_is_written_unasked(pytester, package):
    file = package()
    run(pytester)
    assert not file.exists()


def test_a_failed_test_leaves_no_certificate_and_is_named(pytester, package):
    file = package(exceptions={})
    out = run(pytester, "--certify")
    assert "still: no certificate, none was written: test_three (failed)" in out
    assert not file.exists()


def test_a_test_that_was_left_out_leaves_no_certificate(pytester, package):
    file = package()
    out = run(pytester, "--certify", "-k", "not test_two")
    assert "still: no certificate, none was written: test_two[1] (not run), test_two[2] (not run)" in out
    assert not file.exists()


def test_a_skip_for_another_reason_than_an_exception_leaves_no_certificate(pytester, package):
    file = package(two='pytest.skip("no transformers here")')
    out = run(pytester, "--certify")
    assert "test_two[1] (no transformers here)" in out
    assert not file.exists()


def test_an_old_certificate_outlives_a_failed_run_and_is_mentioned(pytester, package):
    file = package(exceptions={})
    file.write_text("{}")
    assert "still: no certificate, the old one was left: test_three (failed)" in run(pytester, "--certify")
    assert file.read_text() == "{}"


def test_loading_the_plugin_imports_neither_torch_nor_lightning():
    code = "import sys, eke.testing.plugin; print([name for name in ('torch', 'lightning') if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_a_test_that_fails_as_expected_is_no_pass_and_no_crash(pytester, package):
    file = package(two="pytest.xfail('known to fail')")
    out = run(pytester, "--certify")
    assert "no certificate, none was written: test_two[1] (failed as expected: known to fail)" in out
    assert not file.exists()


# On several processes, and leaving out what is as it was


def test_what_several_processes_ran_makes_one_certificate(pytester, package):
    pytest.importorskip("xdist")
    file = package()
    out = pytester.runpytest_inprocess(
        "-p", "no:cacheprovider", "--certify", "-n", "2", "test_contract.py"
    ).stdout.str()
    assert f"still: certificate written to {file}" in out
    assert json.loads(file.read_text())["passed"] == ["test_one", "test_two"]


@pytest.fixture
def distribution(pytester, package, monkeypatch):
    """A checkout with one distribution, ``callbacks/eke-still``, whose two tests have passed and been certified."""
    package()
    folder = pytester.mkdir("callbacks") / "eke-still"
    for part in ("src", "tests"):
        (folder / part).mkdir(parents=True)
    (folder / "pyproject.toml").touch()
    (pytester.path / "pytest.ini").write_text("[pytest]\n")
    (pytester.path / "eke_still").rename(folder / "src" / "eke_still")
    (pytester.path / "test_contract.py").rename(folder / "tests" / "test_contract.py")
    monkeypatch.syspath_prepend(folder / "src")
    out = pytester.runpytest_inprocess("-p", "no:cacheprovider", "--certify", "callbacks").stdout.str()
    assert "certificate written" in out
    return folder


def left_out(pytester):
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "--changed", "callbacks")
    return result.stdout.str().splitlines()[-1], result.parseoutcomes().get("passed", 0)


def test_a_distribution_that_is_as_it_was_is_left_out_and_the_last_line_says_so(pytester, distribution):
    line, passed = left_out(pytester)
    assert line.startswith("Left out by hash: 4 tests of 1 distributions.")
    assert passed == 0


@pytest.mark.parametrize("place", ["src/eke_still/entry.py", "tests/test_contract.py", "pyproject.toml", "data.npz"])
def test_a_byte_of_its_folder_brings_its_tests_back(pytester, distribution, place):
    with open(distribution / place, "a") as file:
        file.write("\n")
    line, passed = left_out(pytester)
    assert line.startswith("Left out by hash: no test")
    assert passed == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [("versions", ["torch 99"]), ("processor", ["Linux", "x86_64", "sse2"]), ("files", iter([]))],
)
def test_other_libraries_another_processor_or_another_core_bring_its_tests_back(
    pytester, distribution, monkeypatch, name, value
):
    assert left_out(pytester)[1] == 0
    monkeypatch.setattr(unchanged, name, lambda *_: value)
    assert left_out(pytester)[1] == 3


def test_texts_for_people_do_not_bring_them_back(pytester, distribution):
    (distribution / "README.md").write_text("# Still\n")
    assert left_out(pytester)[1] == 0


def test_another_distribution_that_its_files_name_counts_with_it(pytester, distribution):
    other = pytester.path / "callbacks" / "eke-moving" / "src" / "eke_moving"
    other.mkdir(parents=True)
    before = unchanged.fingerprint(distribution)
    (other / "entry.py").touch()
    assert unchanged.fingerprint(distribution) == before
    (distribution / "tests" / "test_both.py").write_text('pytest.importorskip("eke_moving")\n')
    named = unchanged.fingerprint(distribution)
    assert named != before
    (other / "entry.py").write_text("pass\n")
    assert unchanged.fingerprint(distribution) != named


def test_where_a_test_of_the_folder_failed_the_certificate_leaves_nothing_out(pytester, distribution):
    (distribution / "tests" / "test_more.py").write_text("def test_fails():\n    assert False\n")
    pytester.runpytest_inprocess("-p", "no:cacheprovider", "--certify", "callbacks")
    assert "content" not in json.loads((distribution / "src" / "eke_still" / "certificate.json").read_text())
