"""Commands that other distributions add."""

import pytest
from eke.__main__ import main

COMMAND = """
import sys

def main(words):
    print("got", words)
    return 3
"""


@pytest.fixture
def provides(tmp_path, monkeypatch):
    """Install a distribution with a command."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(distribution, command, value="brews:main"):
        info = tmp_path / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.4\nName: {distribution}\nVersion: 1.0\nSummary: Makes tea: 100 % leaves\n"
        )
        (info / "entry_points.txt").write_text(f"[eke.commands]\n{command} = {value}\n")

    (tmp_path / "brews.py").write_text(COMMAND)
    return install


def test_a_command_gets_the_words_after_it_options_included_and_gives_the_exit_code(provides, capsys):
    provides("eke-tea", "tea")
    assert main(["tea", "--green", "-h", "two"]) == 3
    assert capsys.readouterr().out == "got ['--green', '-h', 'two']\n"


def test_help_lists_it_with_what_its_distribution_says_of_itself(provides, capsys):
    provides("eke-tea", "tea")
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert ["tea", "Makes", "tea:", "100", "%", "leaves"] in [line.split() for line in text.splitlines()]
    assert ["list", "installed", "techniques"] in [line.split() for line in text.splitlines()]


def test_a_command_that_does_not_load_hurts_only_who_calls_it(provides, capsys):
    provides("eke-tea", "tea", "a_module_that_is_not_there:main")
    assert main(["list"]) == 0
    assert main(["tea"]) == 2
    assert "eke-tea is installed but 'eke tea' does not load: No module named" in capsys.readouterr().err


def test_two_distributions_with_one_command_are_named(provides, capsys):
    provides("eke-tea", "tea")
    provides("other-tea", "tea")
    assert main(["list"]) == 0
    assert main(["tea"]) == 2
    error = capsys.readouterr().err
    assert "2 distributions provide 'eke tea': " in error
    assert "eke-tea" in error
    assert "other-tea" in error


def test_a_command_of_ours_cannot_be_taken(provides, capsys):
    provides("eke-tea", "list")
    assert main(["list"]) == 0
    assert "got" not in capsys.readouterr().out
