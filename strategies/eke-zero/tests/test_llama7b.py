"""The forecast of a model that no machine here could hold."""

import importlib.util
from pathlib import Path

import pytest
from eke.forecast import forecast
from eke_zero import ZeRO


def test_seven_billion_parameters_on_64_processes_are_forecast_to_the_byte():
    pytest.importorskip("transformers")
    place = Path(__file__).parents[1] / "llama7b.py"
    if not place.exists():
        pytest.skip("llama7b.py lies in the repository only")
    spec = importlib.util.spec_from_file_location("llama7b", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = forecast(module.build, lambda: {"strategy": ZeRO(stage=3, compute_dtype="bfloat16")}, ranks=64)
    count, tensors, buffers = 6_738_415_616, 291, 512
    assert found.parameters == (count, count)
    assert found.held["parameters"] == 4 * count // 64 + buffers
    assert found.held["gradients"] == 4 * count // 64
    assert found.held["optimizer"] == 8 * count // 64 + 4 * tensors  # and each tensor's count of steps
