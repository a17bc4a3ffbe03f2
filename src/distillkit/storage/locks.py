"""Locks on folders that one process at a time may write to."""

import json
import os
import socket
import time
from pathlib import Path

from filelock import FileLock, Timeout

from distillkit.errors import ConfigError, StoreError
from distillkit.storage.atomic import read_json, write_atomically

_LOCK, _OWNER = ".lock", ".lock-owner.json"


class FolderLock:
    """A lock that the operating system releases when its process ends, however it ends.

    Within a process it may be acquired several times, also through several objects for one folder; the last release
    frees the folder.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._lock: FileLock | None = None

    def acquire(self) -> None:
        """Locks the folder, which is created if it does not exist.

        Raises:
            ConfigError: If another process has locked it; the message says which one, and since when.
            StoreError: If it can't be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = str(self.folder.resolve() / _LOCK)
            lock = FileLock(path, timeout=0, thread_local=False, is_singleton=True)
            lock.acquire()
        except Timeout:
            raise ConfigError(
                f"{self.folder} is in use: {self._owner()} is writing to it. Wait until it has ended, or choose "
                "another folder."
            ) from None
        except OSError as error:
            raise StoreError(f"{self.folder} can't be written ({error.strerror}): choose another folder.") from error
        self._lock = lock
        since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        write_atomically(self.folder / _OWNER, json.dumps(owner))

    def release(self) -> None:
        """Frees the folder; does nothing if this object has not locked it."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> "FolderLock":
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _owner(self) -> str:
        try:
            owner = read_json(self.folder / _OWNER, "")
        except StoreError:  # it is about to be written
            return "another process"
        return f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('since')},"
