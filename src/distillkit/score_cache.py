"""What a teacher said about rows, on disk: a few tensors for each row, found by the row's key.

A cache is a folder with safetensors shards and one manifest per rank. As in the response store a shard is complete
before a manifest names it, both appear by an atomic rename, and what no manifest names does not exist. Only keys and
places are in memory; the tensors stay in files, which are mapped. Runs that share a folder may write at the same time.

Letters: R rows of a shard, n positions of a row, N positions of all rows that are asked for.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from distillkit.errors import StoreError
from distillkit.manifest import read_manifest, write_atomically

SCHEMA_VERSION = 1
KEY_BYTES = 16
SHARD_BYTES = 64 * 2**20
"""Size from which a shard is written: what a killed run computes again at most, on each rank."""

_KEY = np.dtype(f"S{KEY_BYTES}")  # compares as bytes do: keys differ in more than zeros at their end, or are the same
_KIND = "teacher cache"


@dataclass(frozen=True)
class Column:
    """One tensor of a row, `[n, *shape]`.

    Args:
        dtype: Its type.
        shape: Its sizes after the positions.
    """

    dtype: torch.dtype
    shape: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As a manifest has it."""
        return asdict(self) | {"dtype": str(self.dtype).removeprefix("torch."), "shape": list(self.shape)}


class ScoreCache:
    """Reads and writes what is kept of rows in a folder.

    Args:
        folder: The cache's folder; made when something is written.
        columns: What each row has, by name.
        settings: What the tensors depend on besides the row, JSON values: a folder holds those of one setting.
        rank: Number of this process: it writes its own shards and manifest, and reads those of all.

    Raises:
        StoreError: If a file is damaged or of another schema version, or the folder holds what other settings gave.
    """

    def __init__(
        self, folder: str | Path, columns: Mapping[str, Column], settings: Mapping[str, Any], rank: int = 0
    ) -> None:
        self.folder, self.columns, self.rank = Path(folder), dict(columns), rank
        self.settings = dict(settings) | {"columns": {name: column.to_json() for name, column in columns.items()}}
        self._files: dict[str, Any] = {}  # by name, in the order in which `_places` counts them
        self._keys = np.empty(0, _KEY)  # [R], ascending
        self._places = np.empty((0, 3), np.int64)  # [R, 3] number of the shard, first position in it, n
        self._buffer: dict[bytes, list[Tensor]] = {}  # a row's tensors in the order of the columns
        self._buffered = 0
        self.refresh()

    def refresh(self) -> None:
        """Takes up the shards that other processes have written."""
        for path in sorted(self.folder.glob("manifest-*.json")):
            for shard in self._read_shards(path):
                if shard["file"] not in self._files:
                    self._open(shard["file"])

    def missing(self, keys: Sequence[bytes]) -> list[bytes]:
        """Those of `keys` that are not in the cache, each once, in their order."""
        unique = list(dict.fromkeys(keys))
        known = self._find(unique) >= 0
        return [key for key, found in zip(unique, known, strict=True) if not found and key not in self._buffer]

    def read(self, keys: Sequence[bytes], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """What is kept of rows, one row after the other.

        Args:
            keys: Keys of rows that are in the cache; a key may occur twice.
            device: Where the tensors are wanted.

        Returns:
            Each column's `[N, ...]`.

        Raises:
            StoreError: If a row is not in the cache.
        """
        if any(key in self._buffer for key in keys):
            self.flush()
        found = self._find(keys)
        if bool((found < 0).any()):
            raise StoreError(f"{self.folder} holds nothing of the row {keys[int((found < 0).argmax())].hex()}.")
        places = self._places[found]
        files, ends = list(self._files), places[:, 2].cumsum().tolist()
        # From pinned memory the copy to a GPU does not wait for the steps before it.
        pin = torch.device(device).type == "cuda"
        tensors = {}
        for name, column in self.columns.items():
            tensor = torch.empty((places[:, 2].sum(), *column.shape), dtype=column.dtype, pin_memory=pin)
            for (file, start, length), end in zip(places.tolist(), ends, strict=True):
                kept = self._files[files[file]].get_slice(name)
                tensor[end - length : end].copy_(kept[start : start + length])
            tensors[name] = tensor.to(device, non_blocking=pin)
        return tensors

    def write(self, keys: Sequence[bytes], lengths: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        """Adds rows. They are on disk once `SHARD_BYTES` have come together, or after `flush`.

        Args:
            keys: Each row's key.
            lengths: Each row's number of positions, n.
            tensors: Each column's `[N, ...]`, one row after the other.

        Raises:
            StoreError: If a row is in the cache already.
        """
        unknown = self.missing(keys)
        if len(unknown) < len(keys):
            twice = next(key for place, key in enumerate(keys) if place >= len(unknown) or unknown[place] != key)
            raise StoreError(f"{self.folder} already holds the row {twice.hex()}.")
        assert tensors.keys() == self.columns.keys()
        parts = []
        for name, column in self.columns.items():
            tensor = tensors[name].detach().to("cpu")
            assert (tensor.dtype, tensor.shape) == (column.dtype, (sum(lengths), *column.shape)), name
            parts.append(torch.split(tensor, list(lengths)))
            self._buffered += tensor.nbytes
        self._buffer |= {key: [part[place] for part in parts] for place, key in enumerate(keys)}
        if self._buffered >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes what is not on disk yet, as a shard, atomically."""
        if not self._buffer:
            return
        rows = list(self._buffer.values())
        lengths = [len(row[0]) for row in rows]
        content = {name: torch.cat([row[place] for row in rows]) for place, name in enumerate(self.columns)}
        content["keys"] = torch.frombuffer(bytearray(b"".join(self._buffer)), dtype=torch.uint8).view(-1, KEY_BYTES)
        content["starts"] = torch.tensor([0, *lengths]).cumsum(0)  # [R + 1]
        data = save(content, {"distillkit": json.dumps({"schema": SCHEMA_VERSION, **self.settings})})
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest = self.folder / f"manifest-{self.rank:05d}.json"
        with FileLock(self.folder / f".lock-{self.rank:05d}"):  # another run may be at it, with the same rank
            shards = self._read_shards(manifest)
            name = f"{self.rank:05d}-{len(shards):05d}.safetensors"
            write_atomically(self.folder / name, data)
            shards.append({"file": name, "rows": len(rows), "positions": sum(lengths), "bytes": len(data)})
            content_of = {"schema": SCHEMA_VERSION, "settings": self.settings, "shards": shards}
            write_atomically(manifest, json.dumps(content_of, indent=1).encode())
        self._buffer, self._buffered = {}, 0
        self.refresh()

    def _read_shards(self, path: Path) -> list[dict[str, Any]]:
        manifest = read_manifest(path, SCHEMA_VERSION, _KIND)
        found = manifest.get("settings", self.settings)
        for name in sorted(found.keys() | self.settings.keys()):
            if found.get(name) != self.settings.get(name):
                raise StoreError(
                    f"{self.folder} holds scores with {name} {found.get(name)}, and this run has "
                    f"{self.settings.get(name)}: use another {_KIND} folder."
                )
        shards: list[dict[str, Any]] = manifest.get("shards", [])
        return shards

    def _open(self, name: str) -> None:
        """Maps a shard and adds its rows to those that are known."""
        path = self.folder / name
        try:
            file: Any = safe_open(path, framework="pt")
            keys, starts = file.get_tensor("keys"), file.get_tensor("starts")
            shapes = {column: tuple(file.get_slice(column).get_shape()) for column in self.columns}
        except (OSError, SafetensorError) as error:
            said = str(error).splitlines()[0]
            raise StoreError(f"{path} can't be read ({said}): restore it or remove the {_KIND}.") from error
        assert shapes == {column: (int(starts[-1]), *kept.shape) for column, kept in self.columns.items()}, path
        places = np.stack([np.full(len(keys), len(self._files)), starts[:-1].numpy(), starts.diff().numpy()], axis=1)
        self._files[name] = file
        found = np.concatenate([self._keys, np.frombuffer(keys.numpy().tobytes(), _KEY)])
        order = np.argsort(found, kind="stable")  # of a row that two runs wrote at once, the first is read
        self._keys, self._places = found[order], np.concatenate([self._places, places])[order]

    def _find(self, keys: Sequence[bytes]) -> NDArray[np.int64]:
        """Each key's place among those that are known, -1 for one that is not: `[rows]`."""
        if not keys or not len(self._keys):
            return np.full(len(keys), -1)
        wanted = np.frombuffer(b"".join(keys), _KEY)
        places = np.searchsorted(self._keys, wanted)
        found = self._keys[np.minimum(places, len(self._keys) - 1)] == wanted
        return np.where(found, places, -1)
