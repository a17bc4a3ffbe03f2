"""File access of a store: a local folder, or any remote file system that fsspec can open.

A local file is written to a temporary file, synced and renamed, and is read through a memory map. A remote file is
uploaded as one object, which object stores do completely or not at all, and is downloaded when it is read.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock

from distillkit.errors import StoreError
from distillkit.storage.atomic import write_atomically

_REMOTE_STAMPS = ("ETag", "mtime", "LastModified", "updated", "created")
"""Fields of fsspec's file systems that change when a file changes, besides its size."""

Stamp = tuple[object, ...]
"""Values that differ after a file has been changed, such as its size and modification time."""


class StoreFolder:
    """The files of a store.

    Args:
        path: A local folder, `file://…`, or another fsspec address, such as `s3://…` or `memory://…`.

    Raises:
        StoreError: If no installed file system knows the address.
    """

    def __init__(self, path: str | Path) -> None:
        self.name = str(path)
        self.local: Path | None = None
        self._remote: Any = None
        if "://" not in self.name:
            self.local = Path(path)
            return
        from fsspec.core import url_to_fs

        try:
            filesystem, self._root = url_to_fs(self.name)
        except (ImportError, ValueError) as error:
            raise StoreError(
                f"{self.name} can't be opened as a store ({error}). Correct the address, or install the package that "
                "its file system needs."
            ) from error
        if "file" in filesystem.protocol:
            self.local = Path(self._root)
        else:
            self._remote = filesystem

    def __str__(self) -> str:
        return self.name

    @property
    def root(self) -> str:
        """A canonical name of the folder: equal for two addresses of the same folder."""
        return str(self.local.resolve()) if self.local is not None else f"{self._remote.protocol}:{self._root}"

    def address(self, name: str) -> str:
        """Path or address of a file, as error messages show it."""
        return str(self.local / name) if self.local is not None else f"{self.name.rstrip('/')}/{name}"

    def stamps(self, prefix: str) -> dict[str, Stamp]:
        """The files whose names start with `prefix`, sorted by name, each with its stamp."""
        stamps: dict[str, Stamp] = {}
        if self.local is not None:
            if self.local.is_dir():
                for entry in os.scandir(self.local):
                    if entry.name.startswith(prefix):
                        status = entry.stat()
                        stamps[entry.name] = (status.st_size, status.st_mtime_ns, status.st_ino)
            return dict(sorted(stamps.items()))
        self._remote.invalidate_cache(self._root)
        for info in self._remote.ls(self._root, detail=True) if self._remote.isdir(self._root) else ():
            name = info["name"].rpartition("/")[2]
            if name.startswith(prefix):
                stamps[name] = (info["size"], *(str(info[key]) for key in _REMOTE_STAMPS if key in info))
        return dict(sorted(stamps.items()))

    def read(self, name: str) -> bytes:
        """Returns the content of a file."""
        if self.local is not None:
            return (self.local / name).read_bytes()
        return bytes(self._remote.cat_file(f"{self._root}/{name}"))

    def write(self, name: str, data: bytes) -> None:
        """Writes a file atomically: readers see all of it or nothing."""
        if self.local is not None:
            (self.local / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.local / name, data)
        else:
            self._remote.pipe_file(f"{self._root}/{name}", data)

    def buffer(self, name: str) -> pa.Buffer:
        """Returns the content of a file. A local file is memory-mapped, so its pages are read when they are used.

        Raises:
            StoreError: If the file can't be read.
        """
        try:
            if self.local is None:
                return pa.py_buffer(self.read(name))
            with pa.memory_map(self.address(name)) as file:
                return file.read_buffer()
        except (OSError, pa.ArrowException) as error:
            reason = str(error).splitlines()[0]
            raise StoreError(
                f"{self.address(name)} can't be read ({reason}): restore it or remove the store."
            ) from error

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """A lock that one process at a time can hold under `name`.

        Remote file systems have no locks: each process must use a name of its own there.
        """
        if self.local is None:
            yield
            return
        self.local.mkdir(parents=True, exist_ok=True)
        with FileLock(self.local / f".lock-{name}"):
            yield

    def remove_unfinished(self, folder: str, mark: str) -> None:
        """Removes temporary files that killed processes left behind; call it while holding the processes' lock.

        Args:
            folder: Subfolder to clean as well as the store's folder.
            mark: Text in the names of the files to remove.
        """
        if self.local is not None:
            for path in [*self.local.glob(f".*{mark}*"), *(self.local / folder).glob(f".*{mark}*")]:
                if not path.name.startswith(".lock"):
                    path.unlink(missing_ok=True)
