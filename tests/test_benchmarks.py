"""Each benchmark.py still builds what it compares and times: techniques change under it, and it is run rarely."""

import importlib.util
import sys
from pathlib import Path

import eke
import pytest
import torch
from eke_bench import Benchmark, Timing

REPO = Path(__file__).parents[1]
FILES = sorted(file for kind in ("callbacks", "plugins", "strategies") for file in REPO.glob(f"{kind}/*/benchmark.py"))


def parts(file):
    """The comparisons and timings of a script, by name."""
    spec = importlib.util.spec_from_file_location(f"benchmark_of_{file.parent.name.replace('-', '_')}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return [(name, part) for name, part in vars(module).items() if isinstance(part, Benchmark | Timing)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_recipes_build_and_a_step_of_each_way_runs(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    for name, part in parts(file):
        if isinstance(part, Timing):
            steps = part.build("smoke").values()
            with torch.compiler.set_stance("force_eager"):  # compiling takes longer than all else here
                for step in steps:
                    step()
            continue
        part.shapes("smoke")
        for recipe in [*part.variants.values(), *part.controls.values()]:
            assert eke.trainer_kwargs(**recipe), name
