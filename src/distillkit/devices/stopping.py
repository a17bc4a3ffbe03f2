"""Stopping by a signal: SIGTERM and Ctrl-C end a run soon, with what is worth saving saved, and never as a success.

The command installs the handlers. A signal raises `StopRequested` at once wherever the process is (responses that were
received are saved by then), with two exceptions: within a training step it waits for the end of the step, so that a
checkpoint can be saved, unless a second signal comes; and while a module is imported it waits for the end of that,
since an error within an import leaves modules that are half made.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_log = logging.getLogger(__name__)

PARENT = "DISTILLKIT_PARENT"
"""Environment variable with a process id: the `distillkit` command ends when that process ends."""

_IMPORT_SECONDS = 10.0
"""Longest wait for the end of an import: a program may also do all its work while it is imported."""
_RETRY_SECONDS = 0.05

SIGNALS = (signal.SIGTERM, signal.SIGINT)

PARENT = "DISTILLKIT_PARENT"
"""Environment variable with a process id: the `distillkit` command ends when that process ends."""


class StopRequested(BaseException):
    """A signal asks the process to end. Not an `Exception`, so that no handler of errors takes it for one.

    Args:
        signum: The signal.

    Attributes:
        finished: The `Response`s that a generator had received by then, which are saved.
        saved: What the run has saved by then, in words.
        arguments: Arguments that the same command needs to go on.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum
        self.finished: tuple[Any, ...] = ()
        self.saved: list[str] = []
        self.arguments: tuple[str, ...] = ()

    @property
    def status(self) -> int:
        """Exit status of a process that a signal ends: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + self.signum

    @property
    def is_interrupt(self) -> bool:
        """True for Ctrl-C."""
        return self.signum == signal.SIGINT

    def __str__(self) -> str:
        return "stopped by Ctrl-C" if self.is_interrupt else f"stopped by {signal.Signals(self.signum).name}"


class _State:
    """The state of this process, which has one set of handlers.

    Args:
        is_installed: Whether the process is within `stop_signals`.
        is_deferred: Whether a signal waits for `check`.
        pending: A signal that waits; None if there is none.
        forward: Passes a signal on to the run's other processes.
        retries: How often a signal has waited for the end of an import.
    """

    is_installed: bool = False
    is_deferred: bool = False
    pending: int | None = None
    forward: Callable[[int], None] | None = None
    retries: int = 0


_state = _State()


@contextmanager
def stop_signals() -> Iterator[None]:
    """Handles SIGTERM and Ctrl-C within the block. Outside of the main thread it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # A process that was started in the background of a shell ignores Ctrl-C, and goes on ignoring it.
    heeded = [signum for signum in SIGNALS if signal.getsignal(signum) != signal.SIG_IGN]
    before = {signum: signal.signal(signum, _handle) for signum in heeded}
    _state.is_installed, _state.is_deferred, _state.pending, _state.forward = True, False, None, None
    _state.retries = 0
    try:
        yield
    finally:
        _state.is_installed = False
        for signum, handler in before.items():
            signal.signal(signum, handler)


def install(forward: Callable[[int], None] | None = None) -> None:
    """Puts the handler of SIGTERM back where a library has replaced it, within `stop_signals`.

    Args:
        forward: Passes a signal on to the run's other processes.
    """
    if _state.is_installed:
        signal.signal(signal.SIGTERM, _handle)
        _state.forward = forward


def defer() -> None:
    """From now on a signal waits for `check`: a training step has begun."""
    _state.is_deferred = True


def is_pending() -> bool:
    """Whether a signal waits for the end of the step."""
    return _state.pending is not None


def check() -> None:
    """Ends the deferral.

    Raises:
        StopRequested: If a signal came in the meantime.
    """
    _state.is_deferred = False
    if _state.pending is not None:
        raise StopRequested(_state.pending)


def _handle(signum: int, frame: FrameType | None) -> None:
    if _state.retries * _RETRY_SECONDS < _IMPORT_SECONDS and _is_importing(frame):
        _state.retries += 1
        timer = threading.Timer(_RETRY_SECONDS, _repeat, (signum,))
        timer.daemon = True
        timer.start()
        return
    if _state.is_deferred and _state.pending is None:
        _state.pending = signum
        _log.warning("%s: saving a checkpoint after this step; a second signal stops at once", StopRequested(signum))
        return
    if _state.forward is not None:
        _state.forward(signum)
    raise StopRequested(signum)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _repeat(signum: int) -> None:
    if _state.is_installed:
        os.kill(os.getpid(), signum)
