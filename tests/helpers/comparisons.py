"""Where a running comparison is, seen from outside."""

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path


def heed_interrupts() -> None:
    """What is started in the background ignores them, and so do its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def in_curation(out: Path) -> bool:
    return bool(list(out.glob("responses/**/*.arrow")))


def in_training(out: Path) -> bool:
    return bool(list(out.glob("runs/*/*/checkpoints/*.ckpt")))


def in_evaluation(out: Path) -> bool:
    return bool(list(out.glob("runs/*/*/fitted.json")))


def wait_for(happened: Callable[[], bool], child: "subprocess.Popen[bytes] | None" = None) -> None:
    end = time.monotonic() + 300
    while not happened():
        assert time.monotonic() < end
        assert child is None or child.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)


def still_running(folder: Path) -> bool:
    """Whether a process of a run is left."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes():
                return True
        except OSError:
            continue
    return False
