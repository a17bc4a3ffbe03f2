"""A pytest plugin that writes a row for each test as soon as it is done: a run that is killed keeps those so far."""

import json
import os
from pathlib import Path

import pytest

FILE = "DISTILLKIT_ROWS_OF_TESTS"
"""Environment variable with the path of the rows."""


def pytest_configure(config: pytest.Config) -> None:
    """Registers the writer in the main process; xdist's workers report to it."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Rows(Path(os.environ[FILE])))


class Rows:
    """Writes rows as JSON, one per line.

    Args:
        file: Path of the rows; its content is replaced.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        file.write_text("")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Writes a file that can't be collected as a failed test."""
        if report.failed:
            self._write(report, 0.0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Writes the result of a test, and a set-up or tear-down that does not pass."""
        if report.when == "call" or not report.passed:
            self._write(report, report.duration)

    def _write(self, report: pytest.CollectReport | pytest.TestReport, seconds: float) -> None:
        row = {"test": report.nodeid, "status": report.outcome, "seconds": round(seconds, 3)}
        if report.skipped:
            text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            row["reason"] = text.removeprefix("Skipped: ")[:200]
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            row["reason"] = getattr(crash, "message", report.longreprtext).strip().partition("\n")[0][:200]
            row["detail"] = report.longreprtext
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
