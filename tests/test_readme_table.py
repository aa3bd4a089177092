import importlib.util
import json
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("readme_table", REPO / "tools" / "readme_table.py")
readme_table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(readme_table)


def technique(repo, kind, name, section, **records):
    folder = repo / kind / name
    package = name.replace("-", "_")
    (folder / "src" / package).mkdir(parents=True)
    points = "".join(f'{one} = "{package}.{one}"\n' for one in records)
    (folder / "pyproject.toml").write_text(
        f'[project]\nname = "{name}"\ndescription = "Does {name} | well"\n[project.entry-points.eke]\n{points}'
    )
    for one, fields in records.items():
        (folder / "src" / package / f"{one}.py").write_text(
            "import eke\n\n@eke.hookimpl\ndef eke_technique():\n"
            f"    return eke.Technique({one!r}, 'callback', **{fields!r})\n"
        )
    (folder / "README.md").write_text(
        f"# {name}\n\n## When not to use it\n\n{section}\n\n## Works with\n\nAll. Else.\n"
    )


def test_each_technique_has_a_row_by_name_from_record_benchmark_and_readme(tmp_path):
    technique(tmp_path, "plugins", "eke-z-last", "Short runs: warm-up takes\n2.5 s. Nothing else.")
    technique(tmp_path, "plugins", "eke-steps", "Never.", steps={"does": "Steps", "topics": ("optimizer",)})
    memory = {"does": "Is small", "topics": ("quantized training", "optimizer")}
    technique(tmp_path, "strategies", "eke-small", "Never.", again={"does": "Is small again"}, small=memory)
    technique(tmp_path, "callbacks", "eke-first", "- On `tpu`.\n- Never.")
    results = tmp_path / "benchmarks" / "cpu-2core"
    results.mkdir(parents=True)
    (results / "z_last-gpt-cpu.json").write_text(json.dumps({"headline": "half the bytes"}))
    (results / "z_last-step-cpu.json").write_text(json.dumps({"headline": ""}))
    (results / "z_last-vit-cpu.json").write_text(json.dumps({"headline": "twice the time"}))
    (results / "z_last-gpt-smoke.json").write_text(json.dumps({"headline": "nothing"}))
    head = ["", "| technique | what it does | measured effect | when not to use it |", "| --- | --- | --- | --- |"]
    assert readme_table.table(tmp_path).splitlines() == [
        "**2.1 Optimization** (optimizer, initialization, sparse training, overparameterization, large batch training, "
        "incremental learning)",
        *head,
        "| [eke-small](strategies/eke-small) | Is small; Is small again | see 3 Memory efficiency |  |",
        "| [eke-steps](plugins/eke-steps) | Steps | not measured yet | Never. |",
        "",
        "**3 Memory efficiency** (parallelism, quantized training, rematerialization and offloading, "
        "parameter-efficient tuning)",
        *head,
        "| [eke-small](strategies/eke-small) | Is small; Is small again | not measured yet | Never. |",
        "",
        "**Not in the survey**",
        *head,
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
