"""The number of all fuzzed inputs, below pytest's report."""

import pytest

from helpers.fuzzing import TOTALS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TOTALS:
        counts = ", ".join(f"{count:,} {name}" for name, count in sorted(TOTALS.items()))
        terminalreporter.write_line(f"fuzzed inputs: {TOTALS['accepted'] + TOTALS['refused']:,} ({counts})")
