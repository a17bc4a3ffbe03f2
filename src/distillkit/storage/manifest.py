"""Manifests: JSON files with a checksum that list the files of a folder, and checks of all that they say."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from distillkit.errors import StoreError
from distillkit.storage.checksum import CHECKSUM, checksum


def encode_manifest(content: Mapping[str, Any]) -> bytes:
    """A manifest as the bytes of its file.

    Args:
        content: A JSON object with the key `schema`; the checksum is added to it.
    """
    return json.dumps({**content, "checksum": _checksum_of(content)}, indent=1).encode()


def read_manifest(path: Path, schema: int, kind: str) -> dict[str, Any]:
    """Returns the content of a manifest file, or an empty dictionary if the file does not exist.

    Args:
        path: A JSON file with an object whose `schema` is its version.
        schema: The version that the caller can read.
        kind: Word for the folder in error messages, such as `store`.

    Raises:
        StoreError: If the manifest is damaged or has another version.
    """
    return parse_manifest(path.read_bytes(), str(path), schema, kind) if path.exists() else {}


def parse_manifest(data: bytes, source: str, schema: int, kind: str) -> dict[str, Any]:
    """Returns the manifest encoded in `data`, without its checksum.

    Args:
        data: A JSON object whose `schema` is its version.
        source: Path or address of the manifest, for error messages.
        schema: The version that the caller can read.
        kind: Word for the folder in error messages, such as `store`.

    Raises:
        StoreError: If the manifest is damaged or has another version.
    """
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as error:  # not JSON, or not even UTF-8
        raise StoreError(f"{source} is not valid JSON ({error}): restore it or remove the {kind}.") from error
    version = manifest.get("schema") if isinstance(manifest, dict) else None
    if version != schema:
        raise StoreError(f"{source} has schema {version}, this version reads {schema}: use another {kind} folder.")
    content = dict(manifest)
    if content.pop("checksum", None) != _checksum_of(content):
        raise StoreError(f"{source} is damaged (its checksum differs): restore it or remove the {kind}.")
    return content


def _checksum_of(content: Mapping[str, Any]) -> str:
    """The checksum of a JSON object, whatever the order of its keys and the white space in its file."""
    return checksum(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


class Entry:
    """An object in a manifest, whose values are checked when they are read.

    Args:
        values: The JSON value at this point of the manifest.
        source: Path or address of the manifest, and the position in it, for error messages.

    Raises:
        StoreError: If it is no JSON object.
    """

    def __init__(self, values: object, source: str) -> None:
        self.source = source
        if not isinstance(values, dict):
            raise self._error("an entry", values, "a JSON object")
        self.values: dict[str, Any] = values

    def count(self, name: str, least: int = 0) -> int:
        """An integer of at least `least`."""
        value = self.values.get(name)
        if type(value) is not int or not least <= value < 2**63:
            raise self._error(name, value, f"an integer of at least {least}")
        return value

    def number(self, name: str) -> float:
        """A finite number."""
        value = self.values.get(name)
        if type(value) is int and abs(value) < 2**64:
            return float(value)
        if not isinstance(value, float) or not math.isfinite(value):
            raise self._error(name, value, "a finite number")
        return value

    def text(self, name: str) -> str:
        """A string."""
        value = self.values.get(name)
        if not isinstance(value, str):
            raise self._error(name, value, "a string")
        return value

    def file(self, folder: str, suffix: str) -> str:
        """The value of `file`: the path of a file directly in a folder of the store, which leads nowhere else.

        Args:
            folder: The folder within the store, with a slash at its end, or an empty string.
            suffix: Suffix of the file's name.
        """
        value = self.values.get("file")
        form = rf"{re.escape(folder)}[^./\\:\0\ud800-\udfff][^/\\:\0\ud800-\udfff]*{re.escape(suffix)}"
        if not isinstance(value, str) or not re.fullmatch(form, value):
            raise self._error("file", value, f"a path such as {folder}NAME{suffix}, relative to the store")
        return value

    def checksum(self) -> str:
        """The value of `checksum`."""
        value = self.values.get("checksum")
        if not isinstance(value, str) or not CHECKSUM.fullmatch(value):
            raise self._error("checksum", value, "16 hex digits")
        return value

    def require_only(self, names: Iterable[str]) -> None:
        """Refuses keys that are not among `names`."""
        unknown = sorted(self.values.keys() - set(names))
        if unknown:
            raise self._error("a key", unknown[0], "one that this version writes")

    def _error(self, name: str, value: object, form: str) -> StoreError:
        return StoreError(f"{self.source}: {name} must be {form}, got {str(value)[:100]!r}: restore the manifest.")
