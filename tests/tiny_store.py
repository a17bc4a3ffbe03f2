"""Responses to store, and what is in a store, read with pyarrow and json alone."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa

from distillkit.store import Provenance
from distillkit.types import Response, Sampling

TEACHER = Provenance("teacher", "abc", Sampling(temperature=0.8, seed=7), 0)


def responses(*names: str) -> list[Response]:
    """A response to each of these prompts."""
    return [Response(name, (2, 3, len(name)), f"text of {name} é\n", "stop") for name in names]


def by_id(found: list[Response]) -> dict[str, Response]:
    return {response.prompt_id: response for response in found}


# ── read back ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def shard_files(folder: Path) -> list[Path]:
    """The shards that a manifest names, responses and prompts."""
    manifests = [json.loads(path.read_text()) for path in sorted(folder.glob("manifest-*.json"))]
    return [folder / shard["file"] for manifest in manifests for shard in manifest["shards"]]


def rows(folder: Path) -> list[dict[str, Any]]:
    """Every response, with its provenance."""
    found = []
    for path in shard_files(folder):
        with pa.OSFile(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
        about = json.loads(table.schema.metadata[b"distillkit"])
        if "writer" in about:
            kept = {name: about[name] for name in ("writer", "model", "round", "sampling")}
            found += [kept | row for row in table.to_pylist()]
    return found


def stored(folder: Path) -> Counter[str]:
    """How often the store holds each response, with all that is known of it."""
    return Counter(json.dumps(row, default=bytes.hex, sort_keys=True) for row in rows(folder))


def counts(folder: Path) -> Counter[tuple[str, ...]]:
    """How many responses there are to each prompt, by writer, round, sampling and prompt id."""
    names = ("writer", "round", "sampling", "prompt_id")
    return Counter(tuple(str(row[name]) for name in names) for row in rows(folder))
