"""Verification of stored files: every store, teacher cache and checkpoint below a path (`distillkit store verify`)."""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from distillkit.errors import StoreError
from distillkit.storage.checkpoint_files import SUFFIX, damage
from distillkit.storage.files import StoreFolder
from distillkit.storage.index import check_entries, digest
from distillkit.storage.manifest import Entry, parse_manifest
from distillkit.storage.shards import SCHEMA_VERSION, Shard, check_schema, check_values, read_table, require_intact

KIND = "teacher cache"
_SCORE_MANIFEST = re.compile(r"manifest-\d{5}\.json")
_STORE_MANIFEST = re.compile(r"manifest-.+-\d{5}\.json")


@dataclass(frozen=True)
class FileState:
    """The state of one file.

    Args:
        kind: What the file belongs to: `responses`, `scores` or `checkpoints`.
        file: Path or address of the file.
        problem: What is wrong with it; empty if it is whole.
        is_listed: False for a file that no manifest lists, which a killed process leaves and nothing reads.
    """

    kind: str
    file: str
    problem: str = ""
    is_listed: bool = True


def verify(path: str) -> Iterator[FileState]:
    """Reads every stored file at or below a path completely, and yields the state of each.

    Args:
        path: A store, a teacher cache, a run's folder or any folder above these; or the address of a remote store.

    Raises:
        StoreError: If there is no such folder or address.
    """
    if StoreFolder(path).local is None:
        yield from _verify_store(StoreFolder(path))
        return
    root = StoreFolder(path).local
    assert root is not None
    if not root.is_dir():
        raise StoreError(f"{path} is no folder: name a store, a teacher cache or a run.")
    for name, folders, files in os.walk(root):
        folders.sort()
        folder = Path(name)
        if any(map(_STORE_MANIFEST.fullmatch, files)):
            yield from _verify_store(StoreFolder(folder))
        is_cache = "teacher.json" in files or (folder.parent / "teacher.json").is_file()
        if is_cache or any(map(_SCORE_MANIFEST.fullmatch, files)):
            yield from _verify_scores(folder, sorted(files))
        for file in sorted(files):
            if file.endswith(SUFFIX) and not file.startswith(".") and not (folder / file).is_symlink():
                reason = damage(folder / file)
                problem = f"{folder / file} is damaged ({reason}): resume from another checkpoint." if reason else ""
                yield FileState("checkpoints", str(folder / file), problem)


def _verify_store(folder: StoreFolder) -> Iterator[FileState]:
    listed, all_listed = set(), True
    for name in folder.stamps("manifest-"):
        address = folder.address(name)
        try:
            manifest = parse_manifest(folder.read(name), address, SCHEMA_VERSION, "store")
            check_entries(manifest, address)
        except (StoreError, OSError) as error:
            yield FileState("responses", address, str(error))
            all_listed = False
            continue
        yield FileState("responses", address)
        for values in manifest["shards"]:
            shard = Shard(**values)
            listed.add(shard.file)
            problem = _problem(partial(_read_shard, folder, shard))
            yield FileState("responses", folder.address(shard.file), problem)
    shards = sorted((folder.local / "shards").glob("*.arrow")) if folder.local is not None and all_listed else ()
    for path in shards:
        if f"shards/{path.name}" not in listed:
            yield FileState("responses", str(path), is_listed=False)


def _read_shard(folder: StoreFolder, shard: Shard) -> None:
    data, address = folder.buffer(shard.file), folder.address(shard.file)
    require_intact(shard, data, address)
    table = read_table(data, address)
    check_schema(table, shard, address)
    check_values(table, shard, address)
    pairs = zip(table["prompt_id"].to_pylist(), table["id_hash"].to_pylist(), strict=True)
    if any(digest(prompt_id) != id_hash for prompt_id, id_hash in pairs):
        raise StoreError(f"{address} is damaged (a prompt's id and its hash differ): restore it or remove the store.")


def _verify_scores(folder: Path, files: list[str]) -> Iterator[FileState]:
    from distillkit.storage import score_shards, tensor_file  # import torch, which takes seconds

    for name in files:
        path = folder / name
        if name == "head.safetensors":
            yield FileState("scores", str(path), _problem(partial(tensor_file.read_tensors, path, KIND)))
        if name != "teacher.json" and not _SCORE_MANIFEST.fullmatch(name):
            continue
        try:
            manifest = parse_manifest(path.read_bytes(), str(path), score_shards.SCHEMA_VERSION, KIND)
            entries = score_shards.read_entries(manifest, path)
            settings = Entry(manifest.get("settings", {}), f"{path}, settings").values
            columns = {
                column: score_shards.Column.from_json(Entry(values, f"{path}, column {column}"))
                for column, values in Entry(settings.get("columns", {}), f"{path}, columns").values.items()
            }
        except (StoreError, OSError) as error:
            yield FileState("scores", str(path), str(error))
            continue
        yield FileState("scores", str(path))
        for entry in entries:
            problem = _problem(partial(score_shards.read_all, folder, entry, columns))
            yield FileState("scores", str(folder / entry["file"]), problem)


def _problem(read: Callable[[], object]) -> str:
    """The error that reading a file ends in; empty if there is none."""
    try:
        read()
    except StoreError as error:
        return str(error)
    return ""
