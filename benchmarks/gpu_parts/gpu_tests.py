"""The tests that are marked `gpu`, by pytest in a process of its own; a row for each test."""

import importlib.util
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from gpu_parts.cases import CaseError, LeftOutError, OutOfTimeError, Row, Settings
from gpu_parts.commands import ROOT, run_command

MARK = "mark.gpu"
PLUGIN, FILE = "rows_of_tests", "DISTILLKIT_ROWS_OF_TESTS"
"""The plugin that writes a row per test, and the variable with the path of its file."""


def run(settings: Settings, target: str, ignore: str | None = None, select: str | None = None) -> Iterator[Row]:
    """Runs the marked tests below a folder of the repository.

    Args:
        settings: Device and time.
        target: The folder.
        ignore: A folder below it that is left out. Of the rest only files that name the mark are read: others may
            import what is not installed.
        select: Pytest's expression for the names of tests.

    Raises:
        CaseError: If a test fails, or pytest does.
        OutOfTimeError: If there were further tests.
        LeftOutError: If no file names the mark.
    """
    if not (ROOT / target).exists():
        raise CaseError(f"{target} does not exist")
    targets = [target] if ignore is None else marked(ROOT / target, ROOT / ignore)
    if not targets:
        raise LeftOutError(f"no test of {target} besides those of {ignore} is marked gpu")
    report = Path(settings.out).resolve() / "parts" / f"{'tests-gpu' if ignore is None else 'tests-other'}.rows.jsonl"
    # A JUnit file would be written at the end, and xdist takes up to ten seconds to get there after an interrupt.
    command = [sys.executable, "-m", "pytest", "-m", "gpu", *targets, "-p", "no:cacheprovider", "-p", PLUGIN]
    if importlib.util.find_spec("xdist"):
        command += ["-n", {"cuda": "4", "cpu": "2"}[settings.device]]
    command += ["-k", select] if select else []
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent / "plugin"), os.environ.get("PYTHONPATH")]))
    env = {"DISTILLKIT_GPU_TESTS_ON": settings.device, FILE: str(report), "PYTHONPATH": path}
    status, is_over = run_command(command, settings.seconds, ROOT, env)
    rows = read(report)
    if is_over:  # Lightning turns the interrupt into an exit, which pytest reports as a failure
        rows = [row for row in rows if "SystemExit" not in row.get("reason", "")]
    yield from rows
    counts = Counter(row["status"] for row in rows)
    text = ", ".join(f"{counts[name]} {name}" for name in ("passed", "failed", "skipped") if counts[name])
    yield {"figure": text or "no test"}
    if counts["failed"]:
        failed = [row["test"] for row in rows if row["status"] == "failed"]
        raise CaseError(f"{len(failed)} of {len(rows)} tests failed: {', '.join(failed[:3])}")
    if is_over:
        raise OutOfTimeError(f"after {len(rows)} tests")
    if status:
        raise CaseError(f"pytest ended with exit status {status}; its output is in parts/tests.log")


def marked(folder: Path, ignore: Path) -> list[str]:
    """Test files that name the mark."""
    files = [file for file in sorted(folder.rglob("test_*.py")) if ignore not in file.parents]
    return [str(file.relative_to(ROOT)) for file in files if MARK in file.read_text()]


def read(report: Path) -> list[Row]:
    """The tests that were completed; the last line of a killed run may be cut off."""
    return [json.loads(line) for line in report.read_text().split("\n")[:-1]] if report.exists() else []
