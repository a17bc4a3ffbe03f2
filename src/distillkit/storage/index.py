"""Catalog of a store: the shards that its manifests list, and an index from prompt ids to rows. Imports no torch.

Only hashed ids and row locations are in memory, 24 bytes per response; the responses stay on disk. Letters: R rows.
"""

import copy
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distillkit.errors import StoreError
from distillkit.storage.files import Stamp, StoreFolder
from distillkit.storage.manifest import Entry, encode_manifest, parse_manifest
from distillkit.storage.shards import (
    HASHED_ID,
    PROMPTS,
    SCHEMA_VERSION,
    NewShard,
    OpenShard,
    Shard,
    check_schema,
    check_values,
    read_table,
    require_intact,
)

SHARDS_PER_MANIFEST = 256
"""Shards per manifest. Each new shard rewrites one manifest, which stays short however large the store is."""
OPEN_SHARDS = 64
"""Shards to keep open: memory maps of local files, which the system limits in number, or downloaded remote files."""

_Locations = NDArray[np.int32]
"""`[R, 2]`: index of the shard, and row within it."""
_Run = tuple[NDArray[np.bytes_], _Locations]
"""Hashed ids `[R]`, ascending, and their locations `[R, 2]`."""


def digest(prompt_id: str) -> bytes:
    """The 16-byte hash under which the index stores a prompt id."""
    return hashlib.blake2b(prompt_id.encode(), digest_size=HASHED_ID.itemsize).digest()


def digests(prompt_ids: Iterable[str]) -> NDArray[np.bytes_]:
    """The hashes of several prompt ids, `[R]`."""
    return np.frombuffer(b"".join(map(digest, prompt_ids)), HASHED_ID)


class Index:
    """Index from hashed prompt ids to row locations: sorted runs, merged as in a log-structured merge tree.

    A new shard is sorted on its own and merged with runs that are not much larger, so each id is moved about log R
    times in total. Runs are never modified: a copy of the tuple `runs` is a snapshot.
    """

    def __init__(self) -> None:
        self.runs: tuple[_Run, ...] = ()

    def __len__(self) -> int:
        return sum(len(ids) for ids, _ in self.runs)

    def add(self, shards: Sequence[tuple[int, NDArray[np.bytes_]]]) -> None:
        """Adds shards to the index; of several rows with the same id only the first stays.

        Args:
            shards: For each shard its index in the catalog, and the hashed ids `[R]` of its rows.
        """
        shard_indices = [np.full(len(ids), shard_index, np.int32) for shard_index, ids in shards]
        rows = [np.arange(len(ids), dtype=np.int32) for _, ids in shards]
        ids = np.concatenate([ids for _, ids in shards])
        locations = np.stack([np.concatenate(shard_indices), np.concatenate(rows)], axis=1)
        new = find(self.runs, ids)[:, 0] < 0
        run = _sorted(ids[new], locations[new])
        first = np.ones(len(run[0]), bool)
        first[1:] = run[0][1:] != run[0][:-1]
        runs, run = list(self.runs), (run[0][first], run[1][first])
        while runs and len(runs[-1][0]) <= 2 * len(run[0]):
            ids, locations = runs.pop()
            run = _sorted(np.concatenate([ids, run[0]]), np.concatenate([locations, run[1]]))
        self.runs = (*runs, run) if len(run[0]) else tuple(runs)


def find(runs: Sequence[_Run], ids: NDArray[np.bytes_]) -> _Locations:
    """The location `[R, 2]` of each id, as shard index and row; -1 for an id that no run contains."""
    locations = np.full((len(ids), 2), -1, np.int32)
    for run_ids, run_locations in runs:
        position = np.minimum(np.searchsorted(run_ids, ids), len(run_ids) - 1)
        hit = run_ids[position] == ids
        locations[hit] = run_locations[position[hit]]
    return locations


def in_writing_order(runs: Sequence[_Run]) -> _Locations:
    """All locations `[R, 2]` in some runs, sorted by shard and row, which is the order in which they were written."""
    locations = np.concatenate([locations for _, locations in runs]) if runs else np.empty((0, 2), np.int32)
    return locations[np.lexsort((locations[:, 1], locations[:, 0]))]


def _sorted(ids: NDArray[np.bytes_], locations: _Locations) -> _Run:
    order = np.argsort(ids, kind="stable")  # merges inputs that are sorted already
    return ids[order], locations[order]


class Catalog:
    """The shards of a store, with an index for each provenance that is looked up.

    Args:
        folder: The store's files.
        process: Name of this process. It writes manifests and shards under this name, and reads those of all.

    Raises:
        StoreError: If a manifest is damaged or has another schema version.
    """

    def __init__(self, folder: StoreFolder, process: str) -> None:
        self.folder, self.process = folder, process
        self.open = functools.lru_cache(OPEN_SHARDS)(self._open)
        self._cleaned_up = False
        self._last_written: tuple[str, dict[str, Any]] = ("", {})  # name and content of this process's last manifest
        self._forget()
        self.refresh()

    def _forget(self) -> None:
        self.shards: list[Shard] = []
        self.provenances: dict[str, dict[str, Any]] = {}
        self._shards_by_key: dict[str, list[int]] = {}
        self._manifests: dict[str, tuple[Stamp | None, int]] = {}  # stamp and number of shards when last read
        self._indexes: dict[str, tuple[Index, int]] = {}  # with the number of the key's shards that it covers
        self._intact: set[str] = set()  # shards that were compared with their checksum
        self._checked: set[str] = set()  # and those all of whose values were checked
        self.open.cache_clear()

    def refresh(self) -> None:
        """Reads the manifests that other processes have added or changed; unchanged ones are not read again."""
        stamps = self.folder.stamps("manifest-")
        if not self._manifests.keys() <= stamps.keys():  # the store was removed or replaced
            self._forget()
        for name, stamp in stamps.items():
            if name.endswith(".json") and self._manifests.get(name, (None, 0))[0] != stamp:
                self._register(name, stamp, self._read(name))

    def _register(self, name: str, stamp: Stamp, manifest: dict[str, Any]) -> None:
        num_registered = self._manifests.get(name, (None, 0))[1]
        self.provenances |= manifest["provenances"]
        for entry in manifest["shards"][num_registered:]:
            self._shards_by_key.setdefault(entry["key"], []).append(len(self.shards))
            self.shards.append(Shard(**entry))
        self._manifests[name] = (stamp, len(manifest["shards"]))
        if name == self._last_written[0]:
            self._last_written = (name, manifest)

    def _read(self, name: str) -> dict[str, Any]:
        address = self.folder.address(name)
        manifest = parse_manifest(self.folder.read(name), address, SCHEMA_VERSION, "store")
        check_entries(manifest, address)
        return manifest

    def shard_indices(self, key: str) -> list[int]:
        """The indices in `shards` of the shards of a provenance."""
        return self._shards_by_key.get(key, [])

    def index(self, key: str) -> Index:
        """The index of the responses of one provenance, or of the prompts."""
        index, num_indexed = self._indexes.get(key, (Index(), 0))
        shard_indices = self.shard_indices(key)[num_indexed:]
        for start in range(0, len(shard_indices), SHARDS_PER_MANIFEST):  # sorting all at once takes 4 times the memory
            part = shard_indices[start : start + SHARDS_PER_MANIFEST]
            # Copies: views would keep the maps of all these files open.
            index.add([(shard_index, self.open(self.shards[shard_index]).hashes.copy()) for shard_index in part])
        self._indexes[key] = (index, num_indexed + len(shard_indices))
        return index

    def _open(self, shard: Shard) -> OpenShard:
        data, address = self.folder.buffer(shard.file), self.folder.address(shard.file)
        if shard.file not in self._intact or self.folder.local is None:
            require_intact(shard, data, address)
        table = read_table(data, address)
        check_schema(table, shard, address)
        self._intact.add(shard.file)

        def check(values: pa.Table) -> None:
            if shard.file not in self._checked:
                check_values(values, shard, address)
                self._checked.add(shard.file)

        return OpenShard(table, check)

    def add(self, new: Sequence["NewShard"]) -> None:
        """Writes shards, then the manifest that lists them; call it while holding the lock of this process's name."""
        if not self._cleaned_up:
            self.folder.remove_unfinished("shards", f"-{self.process}-")
            self._cleaned_up = True
        manifest, manifest_index = self._manifest_with_room(len(new))
        for new_shard in new:
            file_index = manifest_index * SHARDS_PER_MANIFEST + len(manifest["shards"])
            file = f"shards/{new_shard.label}-{self.process}-{file_index:06d}.arrow"
            data, entry = new_shard.encode(file)
            self.folder.write(file, data)
            if new_shard.provenance is not None:
                manifest["provenances"][new_shard.key] = new_shard.provenance
            manifest["shards"].append(entry)
        name = f"manifest-{self.process}-{manifest_index:05d}.json"
        self.folder.write(name, encode_manifest(manifest))
        self._last_written = (name, manifest)
        self._register(name, self.folder.stamps(name)[name], manifest)

    def _manifest_with_room(self, count: int) -> tuple[dict[str, Any], int]:
        """This process's manifest to which the next `count` shards are added, and its index."""
        names = [name for name in self._manifests if name.startswith(f"manifest-{self.process}-")]
        if names and self._manifests[max(names)][1] + count <= SHARDS_PER_MANIFEST:
            last = max(names)
            manifest = self._last_written[1] if self._last_written[0] == last else self._read(last)
            return copy.deepcopy(manifest), len(names) - 1
        return {"schema": SCHEMA_VERSION, "provenances": {}, "shards": []}, len(names)


def provenance_key(provenance: Mapping[str, Any]) -> str:
    """The key under which a store holds the responses of one provenance: a short hash of all its fields."""
    return hashlib.sha256(json.dumps(dict(provenance), sort_keys=True).encode()).hexdigest()[:16]


def check_entries(manifest: Mapping[str, Any], address: str) -> None:
    """Checks all that a manifest of a store says.

    Args:
        manifest: Its content.
        address: Its path or address, for error messages.

    Raises:
        StoreError: If a value is missing or impossible, or a file lies outside the store.
    """
    provenances = Entry(manifest.get("provenances"), f"{address}, provenances").values
    for key, values in provenances.items():
        provenance = Entry(values, f"{address}, provenance {key[:32]}")
        _check_provenance(provenance)
        if key != provenance_key(provenance.values):
            raise StoreError(f"{address}: provenance {key[:32]} is not the hash of its fields: restore the manifest.")
    shards = manifest.get("shards")
    if not isinstance(shards, list):
        raise StoreError(f"{address} lists no shards: restore the manifest.")
    for index, values in enumerate(shards):
        shard = Shard.of(Entry(values, f"{address}, shard {index}"))
        if shard.key != PROMPTS and shard.key not in provenances:
            raise StoreError(f"{address}, shard {index} has the unknown key {shard.key[:32]}: restore the manifest.")


def _check_provenance(provenance: Entry) -> None:
    for name in ("writer", "model"):
        provenance.text(name)
    provenance.count("round")
    sampling = Entry(provenance.values.get("sampling"), f"{provenance.source}, sampling")
    for name in ("temperature", "top_p", "seed"):
        sampling.number(name)
    for name in ("top_k", "max_new_tokens"):
        sampling.count(name)
