"""Disk cache of a teacher's scores: a few tensors for each row, looked up by the row's key.

A cache is a folder with safetensors shards and one manifest per rank. As in the response store, a shard is complete
before a manifest lists it, both are written by an atomic rename, and a file that no manifest lists is ignored. Only
keys and locations are in memory; the tensors stay in memory-mapped files. Runs that share a folder may write at the
same time.

The keys of a shard and its header are compared with a checksum in the manifest when it is opened, and each row with a
checksum in the shard whenever it is read: a cache of any size opens at once, and no more is read than is used.

Letters: R rows of a shard, n positions of a row, N positions of all requested rows.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

from distillkit.devices.streams import backend
from distillkit.errors import StoreError
from distillkit.storage.atomic import write_atomically
from distillkit.storage.manifest import encode_manifest, read_manifest
from distillkit.storage.score_shards import KEY, KIND, SCHEMA_VERSION, Column, ScoreShard, encode_shard, read_entries

SHARD_BYTES = 64 * 2**20
"""Size at which a shard is written: a killed run recomputes at most this much on each rank."""


class ScoreCache:
    """Reads and writes cached scores in a folder.

    Args:
        folder: The cache's folder; it is created at the first write.
        columns: The tensors of each row, by name.
        settings: Everything besides the row that the tensors depend on, as JSON values. A folder holds the scores of
            one combination of settings.
        rank: Rank of this process. It writes separate shards and a separate manifest, and reads those of all ranks.

    Raises:
        StoreError: If a file is damaged or has another schema version, or the folder holds scores of other settings.
    """

    def __init__(
        self, folder: str | Path, columns: Mapping[str, Column], settings: Mapping[str, Any], rank: int = 0
    ) -> None:
        self.folder, self.columns, self.rank = Path(folder), dict(columns), rank
        self.settings = dict(settings) | {"columns": {name: column.to_json() for name, column in columns.items()}}
        self._files: dict[str, ScoreShard] = {}  # by name; `_locations` refers to them by their order
        self._keys = np.empty(0, KEY)  # [R], ascending
        self._locations = np.empty((0, 2), np.int64)  # [R, 2] index of the shard, and row within it
        self._buffer: dict[bytes, list[Tensor]] = {}  # tensors of rows not yet on disk, in the order of the columns
        self._buffered_bytes = 0
        self.refresh()

    def refresh(self) -> None:
        """Opens the shards that other processes have added."""
        for path in sorted(self.folder.glob("manifest-*.json")):
            for entry in self._read_shards(path):
                if entry["file"] not in self._files:
                    self._open(entry)

    def missing(self, keys: Sequence[bytes]) -> list[bytes]:
        """The `keys` that are not in the cache, each once, in their order."""
        unique = list(dict.fromkeys(keys))
        on_disk = self._find(unique) >= 0
        return [key for key, stored in zip(unique, on_disk, strict=True) if not stored and key not in self._buffer]

    def read(self, keys: Sequence[bytes], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Reads the scores of rows, concatenated in the order of `keys`.

        Args:
            keys: Keys of rows that are in the cache; a key may occur twice.
            device: Device to put the tensors on.

        Returns:
            Each column's `[N, ...]`.

        Raises:
            StoreError: If a row is not in the cache, or damaged.
        """
        if any(key in self._buffer for key in keys):
            self.flush()
        key_indices = self._find(keys)
        absent = key_indices < 0
        if bool(absent.any()):
            raise StoreError(f"{self.folder} has no scores of the row {keys[int(absent.argmax())].hex()}.")
        files = list(self._files.values())
        locations = [(files[file_index], row) for file_index, row in self._locations[key_indices].tolist()]
        ends = np.cumsum([file.length(row) for file, row in locations]).tolist()
        # From pinned memory, a copy to a GPU does not wait for earlier steps.
        pin = backend(torch.device(device)) is not None
        tensors = {
            name: torch.empty((ends[-1] if ends else 0, *column.shape), dtype=column.dtype, pin_memory=pin)
            for name, column in self.columns.items()
        }
        for (file, row), end in zip(locations, ends, strict=True):
            for name, values in file.read(row).items():
                tensors[name][end - len(values) : end].copy_(values)
        return {name: tensor.to(device, non_blocking=pin) for name, tensor in tensors.items()}

    def write(self, keys: Sequence[bytes], lengths: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        """Adds rows. They are buffered and written to disk once they take `SHARD_BYTES`, or by `flush`.

        Args:
            keys: Each row's key.
            lengths: Each row's number of positions, n.
            tensors: Each column's `[N, ...]`, the rows concatenated.

        Raises:
            StoreError: If a row is in the cache already, or a score is NaN; then none of these rows is added.
        """
        missing = self.missing(keys)
        if len(missing) < len(keys):
            duplicate = next(key for index, key in enumerate(keys) if index >= len(missing) or missing[index] != key)
            raise StoreError(f"{self.folder} already holds the row {duplicate.hex()}.")
        assert tensors.keys() == self.columns.keys()
        parts = []
        for name, column in self.columns.items():
            tensor = tensors[name].detach().to("cpu")
            assert (tensor.dtype, tensor.shape) == (column.dtype, (sum(lengths), *column.shape)), name
            if tensor.is_floating_point() and bool(tensor.isnan().any()):
                raise StoreError(
                    f"The teacher's scores ({name}) are NaN, so they are not stored in {self.folder}. Load the teacher "
                    "in another dtype, or check its weights."
                )
            parts.append(torch.split(tensor, list(lengths)))
            self._buffered_bytes += tensor.nbytes
        self._buffer |= {key: [part[index] for part in parts] for index, key in enumerate(keys)}
        if self._buffered_bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes the buffered rows as a shard, atomically."""
        if not self._buffer:
            return
        data, entry = encode_shard(self.columns, self._buffer, self.settings)
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest = self.folder / f"manifest-{self.rank:05d}.json"
        with FileLock(self.folder / f".lock-{self.rank:05d}"):  # another run may write with the same rank
            shards = self._read_shards(manifest)
            name = f"{self.rank:05d}-{len(shards):05d}.safetensors"
            write_atomically(self.folder / name, data)
            shards.append({"file": name} | entry)
            listing = {"schema": SCHEMA_VERSION, "settings": self.settings, "shards": shards}
            write_atomically(manifest, encode_manifest(listing))
        self._buffer, self._buffered_bytes = {}, 0
        self.refresh()

    def _read_shards(self, path: Path) -> list[dict[str, Any]]:
        manifest = read_manifest(path, SCHEMA_VERSION, KIND)
        cached = manifest.get("settings", self.settings)
        for name in sorted(cached.keys() | self.settings.keys()):
            if cached.get(name) != self.settings.get(name):
                raise StoreError(
                    f"{self.folder} holds scores with {name} {cached.get(name)}, and this run has "
                    f"{self.settings.get(name)}: use another {KIND} folder."
                )
        return read_entries(manifest, path)

    def _open(self, entry: Mapping[str, Any]) -> None:
        """Memory-maps a shard and adds its rows to the index."""
        shard = ScoreShard(self.folder / entry["file"], entry, self.columns)
        locations = np.stack([np.full(len(shard.keys), len(self._files)), np.arange(len(shard.keys))], axis=1)
        self._files[entry["file"]] = shard
        all_keys = np.concatenate([self._keys, shard.keys])
        order = np.argsort(all_keys, kind="stable")  # of a row that two runs wrote at once, the first is read
        self._keys, self._locations = all_keys[order], np.concatenate([self._locations, locations])[order]

    def _find(self, keys: Sequence[bytes]) -> NDArray[np.int64]:
        """The index of each key in `_keys`, -1 if it is not there: `[rows]`."""
        if not keys or not len(self._keys):
            return np.full(len(keys), -1)
        queries = np.frombuffer(b"".join(keys), KEY)
        indices = np.searchsorted(self._keys, queries)
        matches = self._keys[np.minimum(indices, len(self._keys) - 1)] == queries
        return np.where(matches, indices, -1)
