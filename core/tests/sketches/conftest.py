"""A third of the sketches goes through the whole contract each day, the others through what fails first. They prove
the core, beside every technique's own contract. `make test-slow` runs the rest; the day is that of test_pairs.py, and
may be given as EKE_COVERING."""

import datetime
import os
import sys
import zlib
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # sketches are imported by name: copies and command lines need that

os.environ.setdefault("EKE_COVERING", datetime.date.today().isoformat())
ALWAYS = (
    "killed_in_mid_epoch", "two_processes_that_resume", "each_effect", "it_fits_twice", "every_exception_names",
    "does_what_its_record_says", "accumulated_gradients_equal",
)  # fmt: skip


def turn(day: str) -> int:
    """Which third: the next one on the next day."""
    try:
        return datetime.date.fromisoformat(day).toordinal() % 3
    except ValueError:
        return zlib.crc32(day.encode()) % 3


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is marked slow
def pytest_collection_modifyitems(items: list) -> None:
    ours = [item for item in items if Path(__file__).parent in item.path.parents]
    contracts = sorted({item.cls.__qualname__ for item in ours if getattr(item.cls, "eke_contract", False)})
    today = set(contracts[turn(os.environ["EKE_COVERING"]) :: 3])
    for item in ours:
        rest = getattr(item.cls, "eke_contract", False) and item.cls.__qualname__ not in today
        if rest and not any(word in item.name for word in ALWAYS):
            item.add_marker(pytest.mark.slow)
