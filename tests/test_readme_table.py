import importlib.util
import json
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("readme_table", REPO / "tools" / "readme_table.py")
readme_table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(readme_table)


def technique(repo, kind, name, section):
    folder = repo / kind / name
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(f'[project]\nname = "{name}"\ndescription = "Does {name} | well"\n')
    (folder / "README.md").write_text(
        f"# {name}\n\n## When not to use it\n\n{section}\n\n## Works with\n\nAll. Else.\n"
    )


def test_each_technique_has_a_row_by_name_from_metadata_benchmark_and_readme(tmp_path):
    technique(tmp_path, "plugins", "eke-z-last", "Short runs: warm-up takes\n2.5 s. Nothing else.")
    technique(tmp_path, "callbacks", "eke-first", "- On `tpu`.\n- Never.")
    results = tmp_path / "benchmarks" / "cpu-2core"
    results.mkdir(parents=True)
    (results / "z_last-gpt-cpu.json").write_text(json.dumps({"headline": "half the bytes"}))
    (results / "z_last-step-cpu.json").write_text(json.dumps({"headline": ""}))
    (results / "z_last-vit-cpu.json").write_text(json.dumps({"headline": "twice the time"}))
    (results / "z_last-gpt-smoke.json").write_text(json.dumps({"headline": "nothing"}))
    assert readme_table.table(tmp_path).splitlines() == [
        "| technique | what it does | measured effect | when not to use it |",
        "| --- | --- | --- | --- |",
        "| [eke-first](callbacks/eke-first) | Does eke-first \\| well | not measured yet | On `tpu`. |",
        "| [eke-z-last](plugins/eke-z-last) | Does eke-z-last \\| well | half the bytes; twice the time | "
        "Short runs: warm-up takes 2.5 s. |",
    ]


def test_the_table_goes_between_its_markers_and_leaves_the_rest():
    text = f"head\n{readme_table.START}\nold\n{readme_table.END}\ntail\n"
    assert readme_table.filled(text, "new") == f"head\n{readme_table.START}\nnew\n{readme_table.END}\ntail\n"
    with pytest.raises(SystemExit, match="README.md needs the lines"):
        readme_table.filled("no markers", "new")


def test_the_table_of_this_repository_is_fresh():
    assert readme_table.main(["--check"]) == 0, "the table in README.md is stale: make table"


def test_every_technique_of_this_repository_is_measured_and_says_when_not_to_use_it():
    assert "not measured yet" not in readme_table.table(REPO)
    assert "not said yet" not in readme_table.table(REPO)
