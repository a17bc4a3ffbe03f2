"""The response store: every response written, on disk, with where it came from.

A store is a folder with Arrow shards and one manifest per writing process (rank). A shard is complete before a manifest
names it, and both appear by an atomic rename: a killed run leaves nothing half-written behind, and what no manifest
names does not exist.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from distillkit.errors import StoreError
from distillkit.manifest import read_manifest, write_atomically
from distillkit.types import Response, Sampling

SCHEMA_VERSION = 1
_COLUMNS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("text", pa.string()),
        ("finish", pa.string()),
        ("seed", pa.uint64()),
    ]
)


@dataclass(frozen=True)
class Provenance:
    """Where a round's responses come from.

    Args:
        writer: Who wrote them: teacher, student, ...
        model: Fingerprint of the weights that wrote them.
        sampling: How they were drawn.
        round: Number of the round.
    """

    writer: str
    model: str
    sampling: Sampling
    round: int

    @property
    def key(self) -> str:
        """A short hash of all of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


class ResponseStore:
    """Reads and writes the responses in a folder.

    Args:
        folder: The store's folder; made when something is written.
        rank: Number of this process: it writes its own shards and manifest, and reads those of all.

    Raises:
        StoreError: If a manifest is damaged or of another schema version.
    """

    def __init__(self, folder: str | Path, rank: int = 0) -> None:
        self.folder = Path(folder)
        self.rank = rank
        self._manifest = self.folder / f"manifest-{rank:05d}.json"
        self._shards: list[dict[str, Any]] = _read_shards(self._manifest)

    def shards(self) -> list[dict[str, Any]]:
        """Every shard that a manifest names, with its provenance and counts."""
        return [shard for path in sorted(self.folder.glob("manifest-*.json")) for shard in _read_shards(path)]

    def read(self, provenance: Provenance) -> dict[str, Response]:
        """The responses of one provenance, by prompt id."""
        found: dict[str, Response] = {}
        for shard in self.shards():
            if shard["key"] == provenance.key:
                found.update(self._read_shard(shard["file"]))
        return found

    def write(self, provenance: Provenance, responses: Sequence[Response]) -> None:
        """Adds responses of one provenance as a shard of their own, atomically.

        Raises:
            StoreError: If one of them is in the store already.
        """
        twice = self.read(provenance).keys() & {response.prompt_id for response in responses}
        if twice:
            raise StoreError(f"{self.folder} already holds a response of {provenance.writer} to prompt {min(twice)}.")
        name = f"{provenance.writer}-{provenance.key}-{self.rank:05d}-{len(self._shards):05d}.arrow"
        seeds = [provenance.sampling.seed_of(provenance.round, response.prompt_id) for response in responses]
        metadata = {"distillkit": json.dumps({"schema": SCHEMA_VERSION, **asdict(provenance)})}
        columns = {
            "prompt_id": [response.prompt_id for response in responses],
            "token_ids": [list(response.token_ids) for response in responses],
            "text": [response.text for response in responses],
            "finish": [response.finish for response in responses],
            "seed": seeds,
        }
        table = pa.table(columns, schema=_COLUMNS.with_metadata(metadata))
        self.folder.mkdir(parents=True, exist_ok=True)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        write_atomically(self.folder / name, sink.getvalue().to_pybytes())
        tokens = sum(len(response.token_ids) for response in responses)
        entry = {"file": name, "key": provenance.key, **asdict(provenance)}
        self._shards.append(entry | {"responses": len(responses), "tokens": tokens})
        manifest = json.dumps({"schema": SCHEMA_VERSION, "shards": self._shards}, indent=1)
        write_atomically(self._manifest, manifest.encode())

    def _read_shard(self, name: str) -> dict[str, Response]:
        try:
            with pa.memory_map(str(self.folder / name)) as source:
                rows = pa.ipc.open_file(source).read_all().to_pylist()
        except (OSError, pa.ArrowInvalid) as error:
            raise StoreError(
                f"{self.folder / name} can't be read ({str(error).splitlines()[0]}): restore it or remove the store."
            ) from error
        return {
            row["prompt_id"]: Response(row["prompt_id"], tuple(row["token_ids"]), row["text"], row["finish"])
            for row in rows
        }


def _read_shards(path: Path) -> list[dict[str, Any]]:
    shards: list[dict[str, Any]] = read_manifest(path, SCHEMA_VERSION, "store").get("shards", [])
    return shards
