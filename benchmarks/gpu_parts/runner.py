"""The parent's side: shares out the time, hands cases to a child process, and replaces one that dies or hangs."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gpu_parts.cases import OUT_OF_TIME, Case, Outcome, Part, Settings

POLL = 0.05
MARGIN = 9.0
"""Seconds before the end of its time at which a case is to end by itself, so that it can write down what it has."""
DETAIL = 20_000
"""Characters of a failed case's output that go into the log."""
BENCHMARKS = Path(__file__).parents[1]


class StopError(KeyboardInterrupt):
    """The command was stopped by a signal.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class Worker:
    """The child process.

    Args:
        log: File for what it prints before its first case.
    """

    def __init__(self, log: Path) -> None:
        path = os.pathsep.join(filter(None, [str(BENCHMARKS), os.environ.get("PYTHONPATH")]))
        env = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        with log.open("a") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gpu_parts.worker"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                env=env,
                start_new_session=True,
            )

    def send(self, job: Mapping[str, Any]) -> None:
        """Hands over a case."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead then, which `status` tells
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()

    @property
    def status(self) -> int | None:
        """The exit status; None while it runs."""
        return self.process.poll()

    def kill(self) -> None:
        """Ends it and every command that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()


class Runner:
    """Runs parts until the time is up.

    Args:
        settings: What cases are run with.
        seconds: Time for all parts.
        faults: Case name to `fail`, `crash` or `hang`.
        limit: Longest time of a case in the place of its own.
        announce: Shows a line.
    """

    def __init__(
        self,
        settings: Settings,
        seconds: float,
        faults: Mapping[str, str] | None = None,
        limit: float | None = None,
        announce: Callable[[str], None] = print,
    ) -> None:
        self.settings, self.faults, self.limit, self.announce = settings, dict(faults or {}), limit, announce
        self.end = time.monotonic() + seconds
        self.folder = Path(settings.out) / "parts"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.outcomes: list[Outcome] = []
        self.interrupted = 0  # the signal that stopped the run
        self._worker: Worker | None = None

    def run(self, parts: Sequence[Part], on_part: Callable[[Sequence[Outcome]], None]) -> None:
        """Runs the parts in order; an interrupt ends what is under way and leaves the rest out.

        Args:
            parts: The parts.
            on_part: Called with all outcomes so far when a part is done.
        """
        interrupted = ""
        for index, part in enumerate(parts):
            part_end = time.monotonic() + share(self.end - time.monotonic(), [later.share for later in parts[index:]])
            before = len(self.outcomes)
            try:
                for case in part.cases if not interrupted else ():
                    self._add(self._case(part, case, part_end))
            except KeyboardInterrupt as error:
                interrupted = str(error) or "interrupted"
                self.interrupted = error.number if isinstance(error, StopError) else signal.SIGINT
                self._stop()
            rest = part.cases[len(self.outcomes) - before :]
            self.outcomes += [
                Outcome(part.name, case.name, "not run", interrupted, anchor=case.anchor) for case in rest
            ]
            on_part(self.outcomes)
        self._stop()

    def _add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.announce(f"{outcome.part} / {outcome.case}: {outcome.status} {outcome.figure or outcome.reason}".rstrip())

    def _case(self, part: Part, case: Case, part_end: float) -> Outcome:
        missing = [module for module in case.needs if importlib.util.find_spec(module) is None]
        outcome = Outcome(part.name, case.name, "not run", OUT_OF_TIME, anchor=case.anchor)
        if missing:
            return replace(outcome, status="left out", reason=f"{', '.join(missing)} is not installed")
        for attempt in (1, 2):
            if part_end - time.monotonic() < case.least:
                return outcome
            try:
                return self._attempt(part, case, part_end, outcome)
            except ChildProcessError as error:  # it died before it had read the case
                self._stop()
                if attempt == 2:
                    return replace(outcome, status="failed", reason=str(error))
        raise AssertionError("two attempts")

    def _attempt(self, part: Part, case: Case, part_end: float, outcome: Outcome) -> Outcome:
        """Runs a case in the child.

        Raises:
            ChildProcessError: If the child ended before the case began.
        """
        events, log = self.folder / f"{part.name}.jsonl", self.folder / f"{part.name}.log"
        start, longest = time.monotonic(), self.limit or case.limit
        seconds = min(longest, part_end - start)
        offsets = [path.stat().st_size if path.exists() else 0 for path in (events, log)]
        self._send(part, case, events, log, seconds)
        rows: list[dict[str, Any]] = []
        begun, result = False, None
        for event in self._events(events, offsets[0], start + seconds):
            begun = begun or event["event"] == "begin"
            if event["event"] == "row":
                rows.append(event["row"])
            elif event["event"] == "end":
                result = event
        if result is not None:
            if not result["fit"] or case.alone:
                self._stop()
            detail = result["detail"] or (_tail(log, offsets[1]) if result["status"] != "passed" else "")
            return replace(
                outcome,
                status=result["status"],
                reason=result["reason"],
                seconds=result["seconds"],
                rows=rows,
                detail=detail,
            )
        assert self._worker is not None
        status = self._worker.status
        self._stop()
        outcome = replace(outcome, seconds=time.monotonic() - start, rows=rows, detail=_tail(log, offsets[1]))
        if status is not None:
            if not begun:
                raise ChildProcessError(f"the process ended with {ending(status)} before the case began")
            return replace(outcome, status="failed", reason=f"the process ended with {ending(status)}")
        if seconds < longest:
            return replace(outcome, reason=f"{OUT_OF_TIME}, stopped after {seconds:.0f} s")
        return replace(outcome, status="failed", reason=f"took longer than its limit of {seconds:.0f} s")

    def _send(self, part: Part, case: Case, events: Path, log: Path, seconds: float) -> None:
        if self._worker is None:
            self._worker = Worker(log)
        settings = replace(self.settings, seconds=max(seconds - MARGIN, 0.5 * seconds))
        fault = self.faults.get(case.name, "") or self.faults.get(f"{part.name}/{case.name}", "")
        job = {"case": case.name, "function": case.function, "arguments": dict(case.arguments), "fault": fault}
        self._worker.send(job | {"settings": asdict(settings), "events": str(events), "log": str(log)})

    def _events(self, path: Path, offset: int, end: float) -> Iterator[dict[str, Any]]:
        """New events, until the case ends, the child dies or time is up."""
        assert self._worker is not None
        while True:
            is_last = self._worker.status is not None or time.monotonic() >= end  # before the file is read
            if path.exists():
                with path.open() as file:
                    file.seek(offset)
                    complete = file.read().rpartition("\n")[0]
                offset += len(complete.encode()) + 1 if complete else 0
                for line in complete.splitlines():
                    event = json.loads(line)
                    yield event
                    if event["event"] == "end":
                        return
            if is_last:
                return
            time.sleep(POLL)

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker = None


def share(seconds: float, shares: Sequence[float]) -> float:
    """The time of the first of several parts, by their shares of what is left."""
    return max(0.0, seconds) * shares[0] / sum(shares)


def ending(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"exit status {status}"
    name = signal.Signals(-status).name
    return f"signal {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def _tail(path: Path, offset: int) -> str:
    """The end of what was printed since `offset`."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read().decode(errors="replace")[-DETAIL:]
