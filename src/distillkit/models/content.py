"""Content hashes of files: large files are read once, and a cache remembers their hashes until they change."""

import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash
from filelock import FileLock

from distillkit.remote.wheels import cache_dir
from distillkit.storage.atomic import write_atomically

_log = logging.getLogger(__name__)

LARGE = 16 * 2**20
"""Size in bytes from which a file's hash is remembered; smaller ones are read each time."""
_LOGGED = 10**9
_BLOCK = 2**24
_THREADS = 4


def content_hash(files: Sequence[Path]) -> str:
    """A hash of the names and the whole content of some files, whatever their folder, times and order.

    A file's hash is remembered with its device, inode, size, and its times of modification and of change, the last of
    which the system sets and no program can: a file that is replaced by one of equal size and time is read again.
    Reading takes as long as loading the files does (XXH3 hashes 11 GB/s per core, in up to four threads), once.

    Args:
        files: Files with different names.

    Returns:
        32 hex digits.

    Raises:
        OSError: If a file can't be read.
    """
    lines = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for path, digest in zip(files, pool.map(_hash, files), strict=True):
            lines.append(f"{path.name} {digest}\n")
    return xxhash.xxh3_128("".join(sorted(lines)).encode()).hexdigest()


def _hash(path: Path) -> str:
    status = path.stat()
    if status.st_size < LARGE:
        return _read(path)
    stamp = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, str(path.absolute()))
    folder = cache_dir() / "hashes"
    memory = folder / hashlib.sha256(repr(stamp).encode()).hexdigest()[:32]
    if not memory.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{memory}.lock"):  # the ranks of a node read a file once
            if not memory.is_file():
                if status.st_size >= _LOGGED:
                    _log.info("reading %s (%.1f GB) once to tell its weights from others", path, status.st_size / 1e9)
                write_atomically(memory, _read(path))
    return memory.read_text()


def _read(path: Path) -> str:
    state, block = xxhash.xxh3_128(), bytearray(_BLOCK)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            state.update(memoryview(block)[:count])
    return state.hexdigest()
