"""Checkpoint files with a checksum: which are whole, and which is the newest of those. Imports no torch.

The checksum is the comment of the zip archive that `torch.save` writes, so a plain `torch.load` reads the file as well.
"""

import functools
import logging
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import xxhash

from distillkit.errors import StoreError

_log = logging.getLogger(__name__)

SUFFIX = ".ckpt"
_MARK = b"distillkit xxh3 "
_COMMENT_BYTES = len(_MARK) + 16
_COMMENT_LENGTH = _COMMENT_BYTES.to_bytes(2, "little")
_END_OF_ARCHIVE = b"PK\x05\x06"
"""First bytes of a zip archive's last 22 before its comment, the last two of which are the comment's length."""


def newest_whole(paths: Iterable[Path]) -> Path | None:
    """The newest of some checkpoints that is whole; None if there are none. Damaged ones are logged.

    Args:
        paths: Checkpoints. The first is taken for the newest if it is a link, the others are ordered by time.

    Raises:
        StoreError: If there are checkpoints and all of them are damaged.
    """
    ordered = sorted(paths, key=lambda path: (path.is_symlink(), path.stat().st_mtime_ns), reverse=True)
    damaged: dict[Path, str] = {}
    for path in ordered:
        target = path.resolve()
        if target in damaged:
            continue
        reason = damage(target)
        if not reason:
            for skipped, why in damaged.items():
                _log.warning("skipped %s, which is damaged (%s); %s is the newest whole one", skipped, why, path.name)
            return path
        damaged[target] = reason
    if damaged:
        names = ", ".join(f"{path.name} ({reason})" for path, reason in damaged.items())
        folder = next(iter(damaged)).parent
        raise StoreError(
            f"All checkpoints in {folder} are damaged: {names}. Restore one, or remove them to start anew."
        )
    return None


def damage(path: Path) -> str:
    """The damage of a checkpoint file in words; an empty string if it is whole.

    A file without our checksum, such as one that Lightning's plugin wrote, is compared with those of the zip archive.
    """
    status = path.stat()
    return _damage(path, status.st_size, status.st_ctime_ns, status.st_ino)


@functools.lru_cache(64)  # a process that looks for the newest whole file then loads it
def _damage(path: Path, size: int, ctime_ns: int, inode: int) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(size - _COMMENT_BYTES - 22, 0))
            end, comment = file.read(22), file.read()
            if not (end.startswith(_END_OF_ARCHIVE) and end.endswith(_COMMENT_LENGTH)):
                return _archive_damage(path)
            file.seek(0)
            is_whole = comment == _MARK + _digest(file, size - _COMMENT_BYTES).encode()
            return "" if is_whole else "its checksum differs"
    except OSError as error:
        return str(error.strerror)


def _archive_damage(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.testzip()
            return "" if member is None else f"the checksum of {member} in it differs"
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, RuntimeError, zlib.error):
        return "it is cut, or no checkpoint"


def _digest(file: IO[bytes], length: int) -> str:
    """Checksum of a checkpoint's bytes up to its comment, as they were before the comment's length was set."""
    state, left = xxhash.xxh3_64(), length - 2
    while left > 0:
        block = file.read(min(left, 2**24))
        state.update(block)
        left -= len(block) or left
    state.update(b"\0\0")
    return state.hexdigest()


class HashedFile:
    """A file for `torch.save` that hashes all that is written to it.

    Args:
        file: The file to write to.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.state = file, xxhash.xxh3_64()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Writes and hashes some bytes."""
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.state.update(data)
        return len(data)

    def flush(self) -> None:
        """Hands the file's content to the operating system."""
        self.file.flush()

    def seal(self) -> None:
        """Adds the checksum as the comment of the archive that was written."""
        self.file.seek(-2, 2)  # the length of the comment, which is 0
        self.file.write(_COMMENT_LENGTH + _MARK + self.state.hexdigest().encode())
