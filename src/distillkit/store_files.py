"""Where a store lies: a local folder, or any other place that fsspec can open.

A local file is written beside its place, synced and renamed, and read through a memory map. Elsewhere a file is put as
one object, which object stores do whole or not at all, and is fetched when it is read.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock

from distillkit.errors import StoreError
from distillkit.manifest import write_atomically

_STAMPS = ("ETag", "mtime", "LastModified", "updated", "created")
"""What file systems call that which changes with a file, besides its size."""


class StoreFolder:
    """The files of a store.

    Args:
        path: A local folder, `file://…`, or another address of fsspec's, such as `s3://…` or `memory://…`.

    Raises:
        StoreError: If no file system that is installed knows the address.
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
                f"{self.name} can't be opened as a store ({error}): correct the address, or install what it needs."
            ) from error
        if "file" in filesystem.protocol:
            self.local = Path(self._root)
        else:
            self._remote = filesystem

    def __str__(self) -> str:
        return self.name

    @property
    def root(self) -> str:
        """One name for the folder, however it was addressed."""
        return str(self.local.resolve()) if self.local is not None else f"{self._remote.protocol}:{self._root}"

    def place(self, name: str) -> str:
        """What errors call a file."""
        return str(self.local / name) if self.local is not None else f"{self.name.rstrip('/')}/{name}"

    def stamps(self, prefix: str) -> dict[str, Any]:
        """The files whose name begins with `prefix`, in order, each with what changes when it does."""
        found: dict[str, Any] = {}
        if self.local is not None:
            if self.local.is_dir():
                for entry in os.scandir(self.local):
                    if entry.name.startswith(prefix):
                        status = entry.stat()
                        found[entry.name] = (status.st_size, status.st_mtime_ns, status.st_ino)
            return dict(sorted(found.items()))
        self._remote.invalidate_cache(self._root)
        for info in self._remote.ls(self._root, detail=True) if self._remote.isdir(self._root) else ():
            name = info["name"].rpartition("/")[2]
            if name.startswith(prefix):
                found[name] = (info["size"], *(str(info[key]) for key in _STAMPS if key in info))
        return dict(sorted(found.items()))

    def read(self, name: str) -> bytes:
        """A file's content."""
        if self.local is not None:
            return (self.local / name).read_bytes()
        return bytes(self._remote.cat_file(f"{self._root}/{name}"))

    def write(self, name: str, data: bytes) -> None:
        """Writes a file that is there whole or not at all."""
        if self.local is not None:
            (self.local / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.local / name, data)
        else:
            self._remote.pipe_file(f"{self._root}/{name}", data)

    def arrow(self, name: str) -> pa.Table:
        """The table in an Arrow file; a local one stays on disk until its parts are touched.

        Raises:
            StoreError: If it is missing or damaged.
        """
        try:
            remote = self.local is None
            with pa.BufferReader(self.read(name)) if remote else pa.memory_map(self.place(name)) as file:
                return pa.ipc.open_file(file).read_all()
        except (OSError, pa.ArrowException) as error:
            said = str(error).splitlines()[0]
            raise StoreError(f"{self.place(name)} can't be read ({said}): restore it or remove the store.") from error

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Held by one process of this name at a time; elsewhere than locally names must be different."""
        if self.local is None:
            yield
            return
        self.local.mkdir(parents=True, exist_ok=True)
        with FileLock(self.local / f".lock-{name}"):
            yield

    def remove_unfinished(self, folder: str, mark: str) -> None:
        """Removes what killed writers of files with `mark` in their name left beside them; call it under their lock."""
        if self.local is not None:
            for path in [*self.local.glob(f".*{mark}*"), *(self.local / folder).glob(f".*{mark}*")]:
                if not path.name.startswith(".lock"):
                    path.unlink(missing_ok=True)
