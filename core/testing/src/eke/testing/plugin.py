"""``pytest --certify``: writes a certificate beside a technique whose whole contract has passed.

pytest loads this module in every run of an environment that has eke, so it imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

EXCEPTED = "excepted: "  # how the reason of a skip begins that the technique's record declares


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("eke").addoption(
        "--certify",
        action="store_true",
        help="write certificate.json into the package of each technique that passed its whole contract",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--certify"):
        config.pluginmanager.register(Certifier(), "eke-certifier")


class Certifier:
    """Takes down how each test of each contract ended."""

    def __init__(self) -> None:
        self.outcomes: dict[type, dict[Any, str]] = {}  # contract class to item to how it ended
        self.lines: list[str] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            self.note(item, "not run")

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        for item in items:
            self.note(item, "not run")

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, Any, None]:
        report = (yield).get_result()
        if hasattr(report, "wasxfail"):
            self.note(item, f"failed as expected: {report.wasxfail}")
        elif report.skipped:
            self.note(item, str(report.longrepr[2]).removeprefix("Skipped: "))
        elif report.failed:
            self.note(item, "failed")
        elif report.when == "call":
            self.note(item, "passed")

    def note(self, item: pytest.Item, outcome: str) -> None:
        if getattr(getattr(item, "cls", None), "eke_contract", False):
            self.outcomes.setdefault(item.cls, {})[item] = outcome

    def pytest_sessionfinish(self) -> None:
        from eke.testing.certify import certify

        self.lines = certify(self.outcomes)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section("certificates")
        for line in self.lines or ["no contract was run"]:
            terminalreporter.line(line)
