"""A watch over the processes of a program: a limit on their number, and on the memory of all of them together.

The limits of the system (`setrlimit`) hold for one process each, and a program may start others. This reads `/proc`, so
that it works on Linux, in a sandbox or without one.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

MAX_PROCESSES = 64
"""Largest number of processes and threads of a program."""
_INTERVAL = 0.05
"""Seconds between two looks."""
_ROUNDS = 20
"""Most looks at a family that goes on growing while it is stopped."""
_PROC = Path("/proc")

Process = tuple[int, int]
"""Id of a process, and when it started: ids are given again."""


@contextlib.contextmanager
def watched(pid: int, memory: int) -> Iterator[None]:
    """Watches a process and all that it starts, kills them if they are too many or too large, and at the end.

    Args:
        pid: The process, the first of its session.
        memory: Bytes of memory of all its processes together.
    """
    first = {process for process in _table() if process[0] == pid} if (_PROC / "self" / "stat").exists() else set()
    if not first:  # no Linux, or it has ended already
        yield
        return
    seen, done = set(first), threading.Event()
    thread = threading.Thread(target=_watch, args=(seen, memory, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        _end(seen)


def _watch(seen: set[Process], memory: int, done: threading.Event) -> None:
    while not done.wait(_INTERVAL):
        members, threads, size = family(seen)
        seen |= members
        if threads > MAX_PROCESSES or size > memory:
            _end(seen)
            return


def _end(seen: set[Process]) -> None:
    """Kills a family; it is stopped first, so that no parent dies whose newest child has not been seen."""
    for _ in range(_ROUNDS):
        members, _, _ = family(seen)
        _send(members, signal.SIGSTOP)
        if members <= seen:
            break
        seen |= members
    _send(seen & family(seen)[0], signal.SIGKILL)


def family(roots: set[Process]) -> tuple[set[Process], int, int]:
    """The live processes among some, of their sessions, and those that they started.

    Returns:
        The processes, the number of their threads, and their memory in bytes.
    """
    table, sessions = _table(), {pid for pid, _ in roots}
    members = {process for process, (_, session, _, _) in table.items() if process in roots or session in sessions}
    while more := {one for one, fields in table.items() if fields[0] in {pid for pid, _ in members}} - members:
        members |= more
    return members, sum(table[one][2] for one in members), sum(table[one][3] for one in members)


def _table() -> dict[Process, tuple[int, int, int, int]]:
    """Parent, session, threads and resident bytes of each live process."""
    table = {}
    for name in os.listdir(_PROC):
        if not name.isdigit():
            continue
        try:
            state, parent, _, session, *rest = (_PROC / name / "stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):  # it has just ended
            continue
        if state not in "ZX":
            size = int(rest[17]) * os.sysconf("SC_PAGE_SIZE")
            table[int(name), int(rest[15])] = int(parent), int(session), int(rest[13]), size
    return table


def _send(processes: set[Process], signum: signal.Signals) -> None:
    for pid, _ in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signum)
