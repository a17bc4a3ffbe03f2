"""Shards of a score cache: safetensors files with the columns of some rows, the rows' keys, and a checksum of each row.

Letters: R rows of a shard, n positions of a row.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from distillkit.errors import StoreError
from distillkit.storage.checksum import checksum
from distillkit.storage.manifest import Entry

SCHEMA_VERSION = 2
KIND = "teacher cache"
KEY_BYTES = 16
KEY = np.dtype(f"S{KEY_BYTES}")  # numpy ignores trailing zero bytes; no two keys differ in those alone

_INDEX = {"keys": torch.uint8, "starts": torch.int64, "checksums": torch.int64}
"""Tensors of a shard besides its columns: keys `[R, 16]`, first positions and their end `[R + 1]`, checksums `[R]`."""
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint16, torch.int32, torch.int64)
}


@dataclass(frozen=True)
class Column:
    """One of the tensors that are stored for each row, `[n, *shape]`.

    Args:
        dtype: Type of the elements.
        shape: Sizes of the dimensions after the positions.
    """

    dtype: torch.dtype
    shape: tuple[int, ...] = ()

    def to_json(self) -> dict[str, object]:
        """The column as a JSON object, as in the manifest."""
        return asdict(self) | {"dtype": str(self.dtype).removeprefix("torch."), "shape": list(self.shape)}

    @classmethod
    def from_json(cls, entry: Entry) -> "Column":
        """The column that a manifest describes.

        Raises:
            StoreError: If it is not one that this version writes.
        """
        dtype, shape = _DTYPES.get(entry.text("dtype")), entry.values.get("shape")
        if dtype is None or not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
            raise StoreError(f"{entry.source} has an unknown type or shape: restore the manifest.")
        return cls(dtype, tuple(shape))


def encode_shard(
    columns: Iterable[str], rows: Mapping[bytes, Sequence[Tensor]], settings: Mapping[str, Any]
) -> tuple[bytes, dict[str, Any]]:
    """The content of a shard's file, and its entry in a manifest without the file's name.

    Args:
        columns: Names of the columns.
        rows: The tensors of each row by key, in the order of the columns, on the CPU.
        settings: Everything besides the row that the tensors depend on, as JSON values.
    """
    tensors = list(rows.values())
    content = {name: torch.cat([row[index] for row in tensors]) for index, name in enumerate(columns)}
    lengths = [len(row[0]) for row in tensors]
    hashes = np.array([int(_row_checksum(row), 16) for row in tensors], np.uint64)
    index = {
        "keys": torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(-1, KEY_BYTES),
        "starts": torch.tensor([0, *lengths]).cumsum(0),
        "checksums": torch.from_numpy(hashes.view(np.int64)),
    }
    data = save(content | index, {"distillkit": json.dumps({"schema": SCHEMA_VERSION, **settings})})
    header = data[: 8 + int.from_bytes(data[:8], "little")]
    counts = {"rows": len(rows), "positions": sum(lengths), "bytes": len(data)}
    return data, {**counts, "checksum": _index_checksum(header, index)}


def read_entries(manifest: Mapping[str, Any], source: Path) -> list[dict[str, Any]]:
    """The shards that a manifest lists, all of whose values are checked.

    Args:
        manifest: Its content; empty if there is none.
        source: Its path, for error messages.

    Raises:
        StoreError: If a value is missing or impossible, or a file lies outside the folder.
    """
    shards = manifest.get("shards", [])
    if not isinstance(shards, list):
        raise StoreError(f"{source} lists no shards: restore it or remove the {KIND}.")
    for index, values in enumerate(shards):
        entry = Entry(values, f"{source}, shard {index}")
        entry.require_only(("file", "rows", "positions", "bytes", "checksum"))
        entry.file("", ".safetensors"), entry.count("rows", 1), entry.count("positions"), entry.count("bytes", 1)
        entry.checksum()
    return shards


class ScoreShard:
    """A memory-mapped shard. Its header and keys are checked when it is opened, each row when it is read.

    Args:
        path: The file.
        entry: The manifest's entry.
        columns: The columns that it must have.

    Raises:
        StoreError: If the file can't be read or is not the one that the manifest describes.
    """

    def __init__(self, path: Path, entry: Mapping[str, Any], columns: Mapping[str, Column]) -> None:
        self.path, self.columns = path, columns
        try:
            with path.open("rb") as stream:
                start = stream.read(8)
                header = start + stream.read(min(int.from_bytes(start, "little"), entry["bytes"]))
            self._file: Any = _open(path)
            index = {name: self._file.get_tensor(name) for name in _INDEX}
            slices = {name: self._file.get_slice(name) for name in columns}
            size, names = path.stat().st_size, set(self._file.keys())
        except (OSError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise StoreError(f"{path} can't be read ({reason}): restore it or remove the {KIND}.") from error
        if size != entry["bytes"] or _index_checksum(header, index) != entry["checksum"]:
            raise self._damaged("it is not the file that its manifest describes")
        positions = entry["positions"]
        expected = {name: (column.dtype, (positions, *column.shape)) for name, column in columns.items()}
        types = {name: (part[0:0].dtype, tuple(part.get_shape())) for name, part in slices.items()}
        if names != {*columns, *_INDEX} or types != expected:
            raise self._damaged("its tensors have other types or shapes than its manifest says")
        self._check_index(index, entry["rows"], positions)
        self.keys: NDArray[np.bytes_] = np.frombuffer(index["keys"].numpy().tobytes(), KEY)
        self._starts: list[int] = index["starts"].tolist()
        self._checksums: NDArray[np.uint64] = index["checksums"].numpy().view(np.uint64)

    def _check_index(self, index: Mapping[str, Tensor], num_rows: int, num_positions: int) -> None:
        shapes = {"keys": (num_rows, KEY_BYTES), "starts": (num_rows + 1,), "checksums": (num_rows,)}
        types = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in index.items()}
        if types != {name: (dtype, shapes[name]) for name, dtype in _INDEX.items()}:
            raise self._damaged("its rows are not those that its manifest says")
        starts = index["starts"]
        if starts[0] != 0 or starts[-1] != num_positions or bool((starts.diff() < 0).any()):
            raise self._damaged("its rows do not begin where the ones before them end")

    def length(self, row: int) -> int:
        """The number of positions of a row, n."""
        return self._starts[row + 1] - self._starts[row]

    def read(self, row: int) -> dict[str, Tensor]:
        """Each column's `[n, ...]` of a row.

        Raises:
            StoreError: If the row differs from its checksum.
        """
        span = slice(self._starts[row], self._starts[row + 1])
        tensors = {name: self._file.get_slice(name)[span] for name in self.columns}
        if int(_row_checksum(list(tensors.values())), 16) != self._checksums[row]:
            raise self._damaged(f"row {row} is not what was written")
        return tensors

    def _damaged(self, reason: str) -> StoreError:
        return StoreError(f"{self.path} is damaged ({reason}): restore it or remove the {KIND}.")


def read_all(folder: Path, entry: Mapping[str, Any], columns: Mapping[str, Column]) -> None:
    """Reads every row of the shard that a manifest's entry describes.

    Raises:
        StoreError: If the shard is damaged.
    """
    shard = ScoreShard(folder / entry["file"], entry, columns)
    for row in range(len(shard.keys)):
        shard.read(row)


def _open(path: Path) -> Any:
    return safe_open(path, framework="pt")


def _row_checksum(columns: Sequence[Tensor]) -> str:
    return checksum(*(column.contiguous().view(torch.uint8).numpy().data for column in columns))


def _index_checksum(header: bytes, index: Mapping[str, Tensor]) -> str:
    return checksum(header, *(index[name].numpy().tobytes() for name in _INDEX))
