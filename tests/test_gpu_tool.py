"""What runs on a GPU in a quarter of an hour: one line that hangs or fails costs only itself."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"


def tool(name):
    spec = importlib.util.spec_from_file_location(f"eke_tool_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


gpu = tool("gpu")

LINE = """
import json, os, sys, time
name, out = sys.argv[1], sys.argv[sys.argv.index("--out") + 1]
open(f"{out}/{name}.json", "w").write(json.dumps({"line": name, "results": {"first": {"ms": 1.0}}}))
if name == "hangs":
    os.fork() or time.sleep(60)
    time.sleep(60)
sys.exit(name == "fails")
"""


@pytest.fixture
def lines(tmp_path, monkeypatch):
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "gpu_lines.py").write_text(LINE)
    monkeypatch.setattr(gpu, "REPO", tmp_path)
    monkeypatch.setattr(gpu, "LEAST", 0.1)
    return [gpu.Line(name, "", 1.5) for name in ("hangs", "fails", "works")]


def test_a_line_that_hangs_is_stopped_with_its_children_and_the_others_go_on(lines, tmp_path):
    states = gpu.run(lines, tmp_path, "cpu", time.monotonic() + 60)
    assert states == {"hangs": "stopped after 2 s", "fails": "ended with status 1", "works": "through"}
    assert gpu.read(tmp_path / "hangs.json")["results"] == {"first": {"ms": 1.0}}


def test_a_line_for_which_no_time_is_left_is_not_begun(lines, tmp_path):
    assert gpu.run(lines, tmp_path, "cpu", time.monotonic()) == dict.fromkeys(
        ("hangs", "fails", "works"), "not begun: no time left"
    )


def test_each_result_is_written_at_once_and_a_failure_has_its_words(tmp_path):
    book = tool("gpu_lines").Book("peft", tmp_path, "cpu", 60)

    def fails():
        raise ValueError("no such kernel")

    book.attempt("full tuning", lambda: {"ms": 2.0, "peak_mib": 3})
    book.attempt("LoRA", fails)
    book.attempt("NF4", lambda: {"ms": 1.0}, needs=600)
    found = json.loads((tmp_path / "peft.json").read_text())
    assert found["results"]["full tuning"]["ms"] == 2.0
    assert found["failed"]["LoRA"].startswith("ValueError: no such kernel")
    assert found["left"] == ["NF4"]
    assert gpu.rows(found)[1] == ("full tuning", "2", "3", "-", "-")


def test_the_contract_leaves_out_what_a_technique_excepts_and_forks_before_it_meets_the_card():
    contract = tool("gpu_contract")
    forking = ("resumes", "loads_without_it")
    order = [any(word in name for word in forking) for name, _ in contract.CHECKS]
    assert order == sorted(order, reverse=True)
