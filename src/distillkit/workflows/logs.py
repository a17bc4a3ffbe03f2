"""The log on the terminal, which only the command shows: a program that imports the package handles logs itself."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.logging import RichHandler


def show_logs(on_stderr: bool = False) -> None:
    """Shows this package's log on the terminal, in full on the first rank; hides Lightning's advertisements.

    Args:
        on_stderr: Whether it goes to standard error, where standard output is what the user asked for.
    """
    is_first_rank = getattr(rank_zero_only, "rank", 0) == 0
    log = logging.getLogger("distillkit")
    log.handlers, log.propagate = [_handler(on_stderr)], False
    log.setLevel(logging.INFO if is_first_rank else logging.WARNING)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)


def _handler(on_stderr: bool) -> RichHandler:
    console = Console(stderr=True) if on_stderr else None
    return RichHandler(logging.INFO, console=console, show_path=False, show_level=False, log_time_format="[%X]")


class _RunLog(logging.FileHandler):
    """A log file that is no longer written once that fails, as on a full disk: the terminal has the log too."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a line; the first one makes the file and its folder."""
        try:
            Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
            super().emit(record)
        except OSError:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name that logging calls
        """Writes no more."""
        self.setLevel(logging.CRITICAL + 1)


@contextmanager
def run_log(path: Path) -> Iterator[None]:
    """Appends this package's log to a file as well, which is made with its first line.

    The file has more than the terminal: of rows that are left out, all.

    Args:
        path: The file.
    """
    log = logging.getLogger("distillkit")
    handler = _RunLog(path, delay=True, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    level = log.level
    if log.isEnabledFor(logging.INFO):
        log.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeHandler(handler)
        handler.close()


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()
