"""The date of a store: a chat template that prints the current date prints this one, in every run with the store."""

from datetime import date
from pathlib import Path

from distillkit.errors import StoreError
from distillkit.storage.files import StoreFolder
from distillkit.storage.manifest import encode_manifest, parse_manifest

FILE = "date.json"
SCHEMA_VERSION = 1


def fixed_date(folder: str | Path) -> date:
    """The date of a store: that of the first run with it, which is written down then.

    Otherwise a prompt would have other tokens on another day: its responses would be reused with a prompt that they
    were not generated for, and every cached score would be missed.

    Args:
        folder: The store's folder, local or a remote one.

    Raises:
        StoreError: If the file is damaged or of another schema version.
    """
    store = StoreFolder(folder)
    stored = read_date(store)
    if stored is None:
        stored = date.today()
        write_date(store, stored)
    return stored


def read_date(store: StoreFolder) -> date | None:
    """The date of a store; None if no run has needed one.

    Raises:
        StoreError: If the file is damaged or of another schema version.
    """
    if FILE not in store.stamps(FILE):
        return None
    manifest = parse_manifest(store.read(FILE), store.address(FILE), SCHEMA_VERSION, "store")
    try:
        return date.fromisoformat(manifest["date"])
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{store.address(FILE)} has no valid date: restore it, or use another store.") from error


def write_date(store: StoreFolder, day: date) -> None:
    """Writes the date of a store, atomically."""
    store.write(FILE, encode_manifest({"schema": SCHEMA_VERSION, "date": day.isoformat()}))
