"""Responses to store, and what is in a store, read with pyarrow and json alone."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from distillkit.storage.checksum import checksum
from distillkit.storage.manifest import encode_manifest
from distillkit.storage.merge import merge
from distillkit.storage.responses import Provenance, ResponseStore
from distillkit.types import Response, Sampling

TEACHER = Provenance("teacher", "abc", Sampling(temperature=0.8, seed=7), 0)


def responses(*names: str) -> list[Response]:
    """A response to each of these prompts."""
    return [Response(name, (2, 3, len(name)), f"text of {name} é\n", "stop") for name in names]


def by_id(responses: list[Response]) -> dict[str, Response]:
    return {response.prompt_id: response for response in responses}


# ── forged ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def sign(folder: Path, change: Callable[[dict[str, Any]], None] = lambda manifest: None) -> None:
    """Changes the first manifest of a store, and signs it and the shards that it lists as if they were so written."""
    path = min(folder.glob("manifest-*.json"))
    manifest = json.loads(path.read_text())
    del manifest["checksum"]
    for shard in manifest["shards"]:
        data = (folder / shard["file"]).read_bytes()
        shard |= {"bytes": len(data), "checksum": checksum(data)}
    change(manifest)
    path.write_bytes(encode_manifest(manifest))


# ── read back ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def shard_files(folder: Path) -> list[Path]:
    """The shards that a manifest names, responses and prompts."""
    manifests = [json.loads(path.read_text()) for path in sorted(folder.glob("manifest-*.json"))]
    return [folder / shard["file"] for manifest in manifests for shard in manifest["shards"]]


def rows(folder: Path) -> list[dict[str, Any]]:
    """Every response, with its provenance."""
    result = []
    for path in shard_files(folder):
        with pa.OSFile(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
        about = json.loads(table.schema.metadata[b"distillkit"])
        if "writer" in about:
            provenance = {name: about[name] for name in ("writer", "model", "round", "sampling")}
            result += [provenance | row for row in table.to_pylist()]
    return result


def stored(folder: Path) -> Counter[str]:
    """Number of times the store contains each response with its provenance."""
    return Counter(json.dumps(row, default=bytes.hex, sort_keys=True) for row in rows(folder))


def counts(folder: Path) -> Counter[tuple[str, ...]]:
    """Number of responses to each prompt, by writer, round, sampling and prompt id."""
    names = ("writer", "round", "sampling", "prompt_id")
    return Counter(tuple(str(row[name]) for name in names) for row in rows(folder))


# For processes of their own, which can import helpers.


def write_many(folder: str | Path, name: str) -> None:
    """Thirty shards of a response each."""
    store = ResponseStore(folder)
    for number in range(30):
        store.write(TEACHER, responses(f"{name} {number}"))


def merge_into(folder: str, source: str) -> None:
    """Merges one store into another."""
    merge(folder, [source])
