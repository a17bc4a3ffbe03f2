"""Atomic file writes, and small JSON files whose damage is one line that says what to do."""

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distillkit.errors import StoreError


def write_atomically(path: Path, data: bytes | str) -> None:
    """Writes a file of which readers see the old content or the new one, never half of one. Text becomes UTF-8.

    Args:
        path: The file; its folder must exist.
        data: The new content.

    Raises:
        StoreError: If the file can't be written; it is then as it was before.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; a file written there becomes `path`, or is removed if the block fails.

    The file is on disk before it is renamed, and the folder before the block is left: neither a killed process nor a
    power cut leaves half a file under the final name.

    Raises:
        StoreError: If the operating system refuses a write, for example because the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        raise StoreError(
            f"{path} can't be written ({error.strerror or error}). Make room, or choose a folder that can be written, "
            "and run the same command again. The file is as it was before."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path, suffix: str) -> None:
    """Removes the temporary files of killed processes; call it only while no other process writes to the folder.

    Args:
        folder: The folder to clean.
        suffix: Suffix of the files that they were to become, such as `.ckpt`.
    """
    for path in folder.glob(f".*{suffix}.*-????????"):
        path.unlink(missing_ok=True)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a small JSON file.

    Args:
        path: The file.
        remedy: What to do if it is damaged, as the end of a sentence.

    Raises:
        StoreError: If the file is missing, empty, cut, or no JSON object.
    """
    content = _parse(_read(path, remedy), path, remedy)
    if not isinstance(content, dict):
        raise StoreError(f"{path} is damaged (it holds no JSON object): {remedy}.")
    return content


def read_json_list(path: Path, remedy: str) -> list[Any]:
    """The array in a small JSON file; arguments and errors are those of `read_json`."""
    content = _parse(_read(path, remedy), path, remedy)
    if not isinstance(content, list):
        raise StoreError(f"{path} is damaged (it holds no JSON array): {remedy}.")
    return content


def read_json_lines(path: Path, remedy: str) -> list[dict[str, Any]]:
    """The objects in a file with a JSON object per line; arguments and errors are those of `read_json`."""
    data = _read(path, remedy)
    if data and not data.endswith(b"\n"):
        raise StoreError(f"{path} is damaged (its last line is cut): {remedy}.")
    rows = [_parse(line, path, remedy) for line in data.splitlines()]
    if not all(isinstance(row, dict) for row in rows):
        raise StoreError(f"{path} is damaged (a line holds no JSON object): {remedy}.")
    return rows


def _read(path: Path, remedy: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path} can't be read ({error.strerror}): {remedy}.") from error


def _parse(data: bytes, path: Path, remedy: str) -> Any:
    if not data.strip():
        raise StoreError(f"{path} is damaged (it is empty): {remedy}.")
    try:
        content = json.loads(data.decode())  # of bytes, it takes half of a surrogate pair for a character
        if b"\\u" in data:  # an escape may stand for half of a character, which no file can hold
            json.dumps(content, ensure_ascii=False).encode()
        return content
    except (ValueError, RecursionError) as error:  # not JSON, or not even UTF-8
        raise StoreError(f"{path} is damaged (it is not valid JSON: {error}): {remedy}.") from error


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on disk."""
    if os.name == "nt" and path.is_dir():  # Windows can't sync a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
