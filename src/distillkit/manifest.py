"""Files that appear whole or not at all, and the manifests that name them."""

import json
import os
from pathlib import Path
from typing import Any

from distillkit.errors import StoreError


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file beside its place, syncs it and renames it: a killed process leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_manifest(path: Path, schema: int, kind: str) -> dict[str, Any]:
    """What a manifest says; nothing if there is none.

    Args:
        path: The manifest, a JSON object with its schema's version as `schema`.
        schema: The version that the caller reads.
        kind: What the folder is called in errors, such as `store`.

    Raises:
        StoreError: If it is damaged or of another version.
    """
    return parse_manifest(path.read_bytes(), str(path), schema, kind) if path.exists() else {}


def parse_manifest(data: bytes, place: str, schema: int, kind: str) -> dict[str, Any]:
    """What the manifest says whose content is `data`; `place` is what errors call it.

    Raises:
        StoreError: If it is damaged or of another version.
    """
    try:
        manifest = json.loads(data)
    except ValueError as error:  # not JSON, or not even UTF-8
        raise StoreError(f"{place} is not valid JSON ({error}): restore it or remove the {kind}.") from error
    found = manifest.get("schema") if isinstance(manifest, dict) else None
    if found != schema:
        raise StoreError(f"{place} has schema {found}, this version reads {schema}: use another {kind} folder.")
    return dict(manifest)
