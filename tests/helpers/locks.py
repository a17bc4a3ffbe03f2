"""A process that holds the lock of a folder."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distillkit.storage.locks import FolderLock
from helpers.runs import process


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """The id of another process that writes to `folder` until the block is left."""
    with process(_hold, str(folder)) as child:
        end = time.monotonic() + 60
        while not (folder / ".lock-owner.json").exists():
            assert time.monotonic() < end
            assert child.exitcode is None
            time.sleep(0.01)
        yield child.pid


def _hold(folder: str) -> None:
    with FolderLock(folder):
        time.sleep(600)
