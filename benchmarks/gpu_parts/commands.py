"""Commands that a case runs as a process, within its time."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The repository."""
BENCHMARKS = Path(__file__).parents[1]

GRACE = 7.0
"""Seconds that an interrupted command has to write down what it has."""

DISTILLKIT = (sys.executable, "-m", "distillkit.cli.main")


def run_command(
    command: Sequence[str], seconds: float, folder: Path | None = None, env: Mapping[str, str] | None = None
) -> tuple[int, bool]:
    """Runs a command; what it prints goes where this process prints.

    Args:
        command: The command.
        seconds: Time after which it is interrupted, and soon after killed.
        folder: Where it runs; None is here.
        env: Variables besides those of this process.

    Returns:
        The exit status, and whether time was up.
    """
    print("$", " ".join(command), flush=True)
    environment = os.environ | dict(env or {})
    # Scripts of this folder have names that other packages have too: a command does not see them.
    entries = environment.get("PYTHONPATH", "").split(os.pathsep)
    environment["PYTHONPATH"] = os.pathsep.join(entry for entry in entries if entry not in ("", str(BENCHMARKS)))
    process = subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL)
    try:
        return process.wait(max(seconds, 1.0)), False
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        return process.wait(GRACE), True
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait(), True
