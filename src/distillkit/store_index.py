"""What a store's manifests name, and where in the shards the answer to a prompt is. Imports no torch.

Only ids and places are in memory, 24 bytes for each response; the responses stay in files. Letters: R rows.
"""

import copy
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distillkit.errors import StoreError
from distillkit.manifest import parse_manifest
from distillkit.store_files import StoreFolder

SCHEMA_VERSION = 2
PROMPTS = "prompts"
"""Key of the shards that hold prompts."""
SHARDS_PER_MANIFEST = 256
"""Shards that one manifest names: what is written again for each new one stays short, however large the store is."""
OPEN_SHARDS = 64
"""Shards that are kept open: maps of local files, whose number a system limits, or whole files from elsewhere."""

_ID = np.dtype("S16")  # compares as bytes do: ids differ in more than zeros at their end, or are the same
_Places = NDArray[np.int32]


def digest(prompt_id: str) -> bytes:
    """16 bytes that stand for a prompt's id in the index."""
    return hashlib.blake2b(prompt_id.encode(), digest_size=_ID.itemsize).digest()


def digests(prompt_ids: Iterable[str]) -> NDArray[np.bytes_]:
    """`[R]` those of several."""
    return np.frombuffer(b"".join(map(digest, prompt_ids)), _ID)


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of responses or prompts, as its manifest names it.

    Args:
        file: Its path within the store.
        key: That of the provenance of all its responses, or `PROMPTS`.
        responses: How many rows it has.
        tokens: Tokens of all of them.
        cut: Responses that were cut at `max_new_tokens`.
        bytes: Size of the file.
        generator: Name of the class that wrote; informs, and is no part of the key.
    """

    file: str
    key: str
    responses: int
    tokens: int
    cut: int
    bytes: int
    generator: str


class Index:
    """Where each prompt's answer is: sorted runs of ids and places, merged as they grow alike.

    A new shard is sorted alone and merged with runs that are not much larger, so that each id is moved about log R
    times in all. Nothing in a run is ever changed: who holds `runs` holds a snapshot.
    """

    def __init__(self) -> None:
        self.runs: tuple[tuple[NDArray[np.bytes_], _Places], ...] = ()  # ids `[R]`, ascending; `[R, 2]` shard and row

    def __len__(self) -> int:
        return sum(len(ids) for ids, _ in self.runs)

    def add(self, shards: Sequence[tuple[int, NDArray[np.bytes_]]]) -> None:
        """Adds shards by number, each with the ids of its rows; of two answers to a prompt the first is found."""
        numbers = [np.full(len(ids), number, np.int32) for number, ids in shards]
        rows = [np.arange(len(ids), dtype=np.int32) for _, ids in shards]
        ids = np.concatenate([ids for _, ids in shards])
        places = np.stack([np.concatenate(numbers), np.concatenate(rows)], axis=1)
        new = find(self.runs, ids)[:, 0] < 0
        run = _sorted(ids[new], places[new])
        first = np.ones(len(run[0]), bool)
        first[1:] = run[0][1:] != run[0][:-1]
        runs, run = list(self.runs), (run[0][first], run[1][first])
        while runs and len(runs[-1][0]) <= 2 * len(run[0]):
            ids, places = runs.pop()
            run = _sorted(np.concatenate([ids, run[0]]), np.concatenate([places, run[1]]))
        self.runs = (*runs, run) if len(run[0]) else tuple(runs)


def find(runs: Sequence[tuple[NDArray[np.bytes_], _Places]], ids: NDArray[np.bytes_]) -> _Places:
    """`[R, 2]` number of the shard and row within it of each id; -1 for one that is in none of the runs."""
    found = np.full((len(ids), 2), -1, np.int32)
    for known, places in runs:
        at = np.minimum(np.searchsorted(known, ids), len(known) - 1)
        hit = known[at] == ids
        found[hit] = places[at[hit]]
    return found


def _sorted(ids: NDArray[np.bytes_], places: _Places) -> tuple[NDArray[np.bytes_], _Places]:
    order = np.argsort(ids, kind="stable")  # merges what is sorted already
    return ids[order], places[order]


class Catalog:
    """The shards of a store, with an index for each provenance that is asked for.

    Args:
        folder: The store's files.
        process: Name of this process: it writes manifests and shards of its own, and reads those of all.

    Raises:
        StoreError: If a manifest is damaged or of another schema version.
    """

    def __init__(self, folder: StoreFolder, process: str) -> None:
        self.folder, self.process = folder, process
        self.open = functools.lru_cache(OPEN_SHARDS)(self._open)
        self._swept = False
        self._written: tuple[str, dict[str, Any]] = ("", {})
        self._forget()
        self.refresh()

    def _forget(self) -> None:
        self.shards: list[Shard] = []
        self.provenances: dict[str, dict[str, Any]] = {}
        self._by_key: dict[str, list[int]] = {}
        self._seen: dict[str, tuple[Any, int]] = {}  # of each manifest its stamp and how many shards it named
        self._indexes: dict[str, tuple[Index, int]] = {}  # with how many of the key's shards are in it
        self.open.cache_clear()

    def refresh(self) -> None:
        """Takes up what other processes have written; manifests that are as they were are not read again."""
        stamps = self.folder.stamps("manifest-")
        if not self._seen.keys() <= stamps.keys():  # somebody removed the store, or put another in its place
            self._forget()
        for name, stamp in stamps.items():
            if name.endswith(".json") and self._seen.get(name, (None, 0))[0] != stamp:
                self._take(name, stamp, self._read(name))

    def _take(self, name: str, stamp: Any, manifest: dict[str, Any]) -> None:
        known = self._seen.get(name, (None, 0))[1]
        self.provenances |= manifest["provenances"]
        for entry in manifest["shards"][known:]:
            self._by_key.setdefault(entry["key"], []).append(len(self.shards))
            self.shards.append(Shard(**entry))
        self._seen[name] = (stamp, len(manifest["shards"]))
        if name == self._written[0]:
            self._written = (name, manifest)

    def _read(self, name: str) -> dict[str, Any]:
        return parse_manifest(self.folder.read(name), self.folder.place(name), SCHEMA_VERSION, "store")

    def of_key(self, key: str) -> list[int]:
        """The numbers of a provenance's shards."""
        return self._by_key.get(key, [])

    def index(self, key: str) -> Index:
        """Where the answers of one provenance are, or the prompts."""
        index, done = self._indexes.get(key, (Index(), 0))
        numbers = self.of_key(key)[done:]
        for start in range(0, len(numbers), SHARDS_PER_MANIFEST):  # sorting all at once would take four times the room
            part = numbers[start : start + SHARDS_PER_MANIFEST]
            # Copies: views would keep the maps of all these files.
            index.add([(number, self.open(self.shards[number]).hashes.copy()) for number in part])
        self._indexes[key] = (index, done + len(numbers))
        return index

    def _open(self, shard: Shard) -> "OpenShard":
        table, place = self.folder.arrow(shard.file), self.folder.place(shard.file)
        about = json.loads((table.schema.metadata or {}).get(b"distillkit", b"{}"))
        if about.get("schema") != SCHEMA_VERSION:
            raise StoreError(
                f"{place} has schema {about.get('schema')}, this version reads {SCHEMA_VERSION}: "
                "restore it or remove the store."
            )
        if table.num_rows != shard.responses:
            raise StoreError(
                f"{place} has {table.num_rows} rows and its manifest says {shard.responses}: "
                "restore it or remove the store."
            )
        return OpenShard(table)

    def add(self, new: Sequence["NewShard"]) -> None:
        """Writes shards, then the manifest that names them; call it under the lock of this process's name."""
        if not self._swept:
            self.folder.remove_unfinished("shards", f"-{self.process}-")
            self._swept = True
        manifest, number = self._own(len(new))
        for one in new:
            place = number * SHARDS_PER_MANIFEST + len(manifest["shards"])
            file = f"shards/{one.label}-{self.process}-{place:06d}.arrow"
            data = _ipc(one.table)
            self.folder.write(file, data)
            if one.provenance is not None:
                manifest["provenances"][one.key] = one.provenance
            shard = Shard(file, one.key, *one.counts(), len(data), one.generator)
            manifest["shards"].append(asdict(shard))
        name = f"manifest-{self.process}-{number:05d}.json"
        self.folder.write(name, json.dumps(manifest, indent=1).encode())
        self._written = (name, manifest)
        self._take(name, self.folder.stamps(name)[name], manifest)

    def _own(self, count: int) -> tuple[dict[str, Any], int]:
        """The manifest of this process that takes the next `count` shards, with its number."""
        own = [name for name in self._seen if name.startswith(f"manifest-{self.process}-")]
        if own and self._seen[max(own)][1] + count <= SHARDS_PER_MANIFEST:
            manifest = self._written[1] if self._written[0] == max(own) else self._read(max(own))
            return copy.deepcopy(manifest), len(own) - 1
        return {"schema": SCHEMA_VERSION, "provenances": {}, "shards": []}, len(own)


class OpenShard:
    """A shard's columns, still on disk where it is a local file.

    Args:
        table: What the file holds.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table.combine_chunks()  # a shard has one chunk, and is then left where it is
        self._columns: dict[str, pa.Array] = {}
        self._lists: dict[str, tuple[NDArray[np.int32], NDArray[Any]]] = {}

    def column(self, name: str) -> pa.Array:
        """A column as one array."""
        if name not in self._columns:
            self._columns[name] = self.table.column(name).chunk(0)
        return self._columns[name]

    @functools.cached_property
    def hashes(self) -> NDArray[np.bytes_]:
        """`[R]` ids as the index has them."""
        return np.frombuffer(self.column("id_hash").buffers()[1], _ID, self.table.num_rows)

    def numbers(self, name: str, row: int) -> tuple[Any, ...]:
        """What a column of lists has in one row."""
        if name not in self._lists:
            column = self.column(name)
            self._lists[name] = (column.offsets.to_numpy(), column.values.to_numpy())
        offsets, values = self._lists[name]
        return tuple(values[offsets[row] : offsets[row + 1]].tolist())


@dataclass(frozen=True)
class NewShard:
    """What is to become a shard.

    Args:
        label: What its file's name begins with.
        key: That of the provenance, or `PROMPTS`.
        provenance: What the key stands for; None for prompts.
        table: Its rows.
        generator: Name of the class that wrote.
    """

    label: str
    key: str
    provenance: Mapping[str, Any] | None
    table: pa.Table
    generator: str = ""

    def counts(self) -> tuple[int, int, int]:
        """Rows, tokens, and responses that were cut."""
        if self.key == PROMPTS:
            return self.table.num_rows, 0, 0
        tokens = sum(len(chunk.values) for chunk in self.table["token_ids"].chunks)
        cut = sum(finish == "length" for finish in self.table["finish"].to_pylist())
        return self.table.num_rows, tokens, cut


def _ipc(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())
