"""Techniques that draw for each process apart: two processes under DDP still end in one state."""

import eke
import pytest
from eke.testing import build_example, checks, example_model

APART = [name for name in eke.available() if "test_two_processes_equal_one" in eke.get(name).exceptions]


@pytest.mark.parametrize("name", [name for name in APART if example_model(name)])
def test_two_processes_agree(name):
    checks.ranks_agree(checks.Subject(build=lambda: build_example(name), model=example_model(name)))
