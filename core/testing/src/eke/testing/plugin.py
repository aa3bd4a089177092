"""``pytest --certify`` writes a certificate beside a technique whose whole contract has passed; ``pytest --changed``
leaves out the tests of techniques that are as they were when they were certified.

pytest loads this module in every run of an environment that has eke, so it imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("eke")
    group.addoption(
        "--certify",
        action="store_true",
        help="write certificate.json into the package of each technique that passed its whole contract, and zoo.json "
        "where it met the whole zoo",
    )
    group.addoption(
        "--zoo",
        action="store_true",
        help="write zoo.json into the package of each technique that met the whole zoo, and no certificate",
    )
    group.addoption(
        "--changed",
        action="store_true",
        help="leave out tests of techniques that nothing they depend on has changed for since they were certified",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--certify") or config.getoption("--zoo"):
        config.pluginmanager.register(Certifier(config), "eke-certifier")
    if config.getoption("--changed"):
        config.pluginmanager.register(Unchanged(config), "eke-unchanged")


class Unchanged:
    """Leaves whole test folders out, before they are imported."""

    def __init__(self, config: pytest.Config) -> None:
        from eke.testing.unchanged import certified

        self.folders = certified(config.rootpath)

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        return True if collection_path in self.folders else None

    def pytest_unconfigure(self, config: pytest.Config) -> None:
        if hasattr(config, "workerinput"):
            return  # the process that runs the others says it
        count = sum(one.get("tests", 0) for one in self.folders.values())
        since = min((one.get("date", "") for one in self.folders.values()), default="")
        line = (
            f"Left out by hash: {count} tests of {len(self.folders)} distributions. Their folders, the core, the kit, "
            "the libraries, Python and the processor are to the byte those on which all of these tests passed "
            f"(first: {since}). make test-all runs them."
            if self.folders
            else "Left out by hash: no test. No distribution is as it was when its certificate was written."
        )
        config.get_terminal_writer().line(line)


class Certifier:
    """Takes down how each test of each contract ended, in every process of a session."""

    def __init__(self, config: pytest.Config) -> None:
        from eke.testing.certify import Outcomes

        self.config = config
        self.outcomes = Outcomes()
        self.classes: dict[str, type] = {}
        self.lines: list[str] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.note(items)

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.note(items)

    def note(self, items: list[pytest.Item]) -> None:
        from eke.testing.certify import Row

        for item in items:
            cls = getattr(item, "cls", None)
            contract = f"{item.nodeid.partition('::')[0]}::{cls.__name__}" if _is_contract(cls) else ""
            if contract:
                self.classes[contract] = cls
            meets = getattr(cls, "eke_zoo", False) and "animal" in getattr(item, "fixturenames", ())
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            self.outcomes.rows[item.nodeid] = Row(
                name=item.name,
                test=getattr(item, "originalname", item.name),
                folder=str(item.path.parent),
                contract=contract,
                shape=getattr(parameters.get("shape"), "__name__", ""),
                exercises=dict(getattr(getattr(item, "function", None), "eke_exercises", {})),
                zoo=f"{item.nodeid.partition('::')[0]}::{cls.__name__}" if meets else "",
            )

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, Any, None]:
        report = (yield).get_result()
        row = self.outcomes.rows[item.nodeid]
        if hasattr(report, "wasxfail"):
            row.outcome = f"failed as expected: {report.wasxfail}"
        elif report.skipped:
            row.outcome = str(report.longrepr[2]).removeprefix("Skipped: ")
        elif report.failed:
            row.outcome = "failed"
        elif report.when == "call":
            row.outcome = "passed"
            row.came = dict(item.user_properties).get("zoo", {})

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        if (plain := getattr(node, "workeroutput", {}).get("eke")) is not None:
            self.outcomes.add(plain)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        from eke.testing.certify import certify, contract_of, met

        self.outcomes.contracts.update({key: contract_of(cls) for key, cls in self.classes.items()})
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["eke"] = self.outcomes.plain()
        else:
            certified = certify(self.outcomes) if self.config.getoption("--certify") else []
            self.lines = met(self.outcomes) + certified

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section("certificates")
        for line in self.lines or ["no contract was run"]:
            terminalreporter.line(line)


def _is_contract(cls: Any) -> bool:
    return bool(getattr(cls, "eke_contract", False))
