"""Shards of a store: Arrow files of responses or prompts, each with a fixed schema and a checksum. Imports no torch.

When a shard is opened, its size and checksum are compared with its manifest, and its schema is checked; offsets and
values are checked when the first of them is used. Nothing unchecked is read, so neither flipped bits nor a forged file
can give other data, memory that is not the file's, or a crash. Letters: R rows.
"""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from distillkit.errors import StoreError
from distillkit.storage.checksum import checksum
from distillkit.storage.manifest import Entry

SCHEMA_VERSION = 3
PROMPTS = "prompts"
"""Key of the shards that contain prompts."""
LARGEST_LOG_PROB = 1e-3
"""Largest log-probability that is stored: above 0 by no more than rounding."""

HASHED_ID = np.dtype("S16")  # numpy ignores trailing zero bytes when it compares; no two ids differ in those alone

_IDS = [("prompt_id", pa.string()), ("id_hash", pa.binary(HASHED_ID.itemsize))]
RESPONSE_COLUMNS = pa.schema(
    [
        *_IDS,
        ("token_ids", pa.list_(pa.int32())),
        ("text", pa.string()),
        ("finish", pa.string()),
        ("seed", pa.uint64()),
        ("log_probs", pa.list_(pa.float32())),
    ]
)
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
PROMPT_COLUMNS = pa.schema([*_IDS, ("messages", _MESSAGES)])
_FINISHES = pa.array(["stop", "length"])


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of responses or prompts, as a manifest lists it.

    Args:
        file: Path within the store.
        key: Key of the provenance that all its responses have, or `PROMPTS`.
        responses: Number of rows.
        tokens: Number of tokens in all rows.
        cut: Number of responses that were cut off at `max_new_tokens`.
        bytes: Size of the file.
        checksum: Checksum of the file.
        generator: Description of the generator; for information only, not part of the key.
        run: Name of the run that generated the responses; empty if no run counts them.
        purpose: What the responses are for: `training`, `reference` (of held-out prompts), or empty if unknown, as in
            stores of earlier versions.
    """

    file: str
    key: str
    responses: int
    tokens: int
    cut: int
    bytes: int
    checksum: str
    generator: str
    run: str = ""
    purpose: str = ""

    @classmethod
    def of(cls, entry: Entry) -> "Shard":
        """The shard that a manifest's entry describes.

        Raises:
            StoreError: If a value is missing or impossible.
        """
        entry.require_only(field.name for field in fields(cls))
        return cls(
            file=entry.file("shards/", ".arrow"),
            key=entry.text("key"),
            responses=entry.count("responses", 1),
            tokens=entry.count("tokens"),
            cut=entry.count("cut"),
            bytes=entry.count("bytes", 1),
            checksum=entry.checksum(),
            generator=entry.text("generator"),
            run=entry.text("run"),
            purpose=entry.text("purpose") if "purpose" in entry.values else "",
        )


class OpenShard:
    """The columns of a shard; those of a local file stay on disk until they are used.

    Args:
        table: The table in the file, whose schema has been checked.
        check_values: Checks all other values; called once, before any but the hashed ids is used.
    """

    def __init__(self, table: pa.Table, check_values: Callable[[pa.Table], None]) -> None:
        self._unchecked, self._check_values = table, check_values
        self._columns: dict[str, pa.Array] = {}
        self._lists: dict[str, tuple[NDArray[np.int32], NDArray[Any]]] = {}

    @functools.cached_property
    def table(self) -> pa.Table:
        """All columns."""
        self._check_values(self._unchecked)
        return self._unchecked.combine_chunks()  # a shard has one chunk, so nothing is copied

    def column(self, name: str) -> pa.Array:
        """A column as one array."""
        if name not in self._columns:
            self._columns[name] = self.table.column(name).chunk(0)
        return self._columns[name]

    @functools.cached_property
    def hashes(self) -> NDArray[np.bytes_]:
        """The hashed ids of the rows, `[R]`."""
        column = self._unchecked.column("id_hash").combine_chunks()
        return np.frombuffer(column.buffers()[1], HASHED_ID, self._unchecked.num_rows)

    def list_values(self, name: str, row: int) -> tuple[Any, ...]:
        """The numbers in one row of a column of lists."""
        if name not in self._lists:
            self._lists[name] = _lists(self.column(name))
        offsets, values = self._lists[name]
        return tuple(values[offsets[row] : offsets[row + 1]].tolist())


@dataclass(frozen=True)
class NewShard:
    """A shard that is about to be written.

    Args:
        label: Start of the file's name.
        key: Key of the provenance, or `PROMPTS`.
        provenance: The provenance that the key is a hash of; None for prompts.
        table: The rows.
        generator: Class name of the generator.
        run: Name of the run that generated the responses; empty if no run counts them.
        purpose: What the responses are for; empty if unknown.
    """

    label: str
    key: str
    provenance: Mapping[str, Any] | None
    table: pa.Table
    generator: str = ""
    run: str = ""
    purpose: str = ""

    def encode(self, file: str) -> tuple[bytes, dict[str, Any]]:
        """The content of the shard's file, and its entry in a manifest.

        Args:
            file: Path of the file within the store.
        """
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, self.table.schema) as writer:
            writer.write_table(self.table)
        data = bytes(sink.getvalue().to_pybytes())
        tokens, cut = (0, 0) if self.key == PROMPTS else _counts(self.table)
        notes = self.generator, self.run, self.purpose
        shard = Shard(file, self.key, self.table.num_rows, tokens, cut, len(data), checksum(data), *notes)
        return data, asdict(shard)


def require_intact(shard: Shard, data: pa.Buffer, address: str) -> None:
    """Compares a shard's file with its manifest.

    Args:
        shard: The manifest's entry.
        data: Content of the file.
        address: Path or address of the file, for the error message.

    Raises:
        StoreError: If size or checksum differ.
    """
    if data.size != shard.bytes:
        raise _damaged(address, f"it has {data.size} bytes and its manifest says {shard.bytes}")
    if checksum(memoryview(data)) != shard.checksum:
        raise _damaged(address, "its checksum is not the one in its manifest")


def read_table(data: pa.Buffer, address: str) -> pa.Table:
    """The table in an Arrow file, whose pages are read when they are used.

    Raises:
        StoreError: If it is no Arrow file.
    """
    try:
        return pa.ipc.open_file(pa.BufferReader(data)).read_all()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _damaged(address, str(error).splitlines()[0]) from error


def check_schema(table: pa.Table, shard: Shard, address: str) -> None:
    """Checks that a table has the columns that this version writes, the rows of its manifest, and an id for each row.

    Raises:
        StoreError: If it does not.
    """
    if not table.schema.equals(PROMPT_COLUMNS if shard.key == PROMPTS else RESPONSE_COLUMNS):
        raise _damaged(address, "its columns are not those of a store")
    version = _metadata(table).get("schema")
    if version != SCHEMA_VERSION:
        raise _damaged(address, f"it has schema {version}, this version reads {SCHEMA_VERSION}")
    if table.num_rows != shard.responses:
        raise _damaged(address, f"it has {table.num_rows} rows and its manifest says {shard.responses}")
    _validate(table.column("id_hash"), address)


def check_values(table: pa.Table, shard: Shard, address: str) -> None:
    """Checks the offsets and every value of a table.

    Raises:
        StoreError: If one is not as this version writes it.
    """
    _validate(table, address)
    if any(_has_null(chunk) for column in table.itercolumns() for chunk in column.chunks):
        raise _damaged(address, "a value is missing")
    if shard.key == PROMPTS:
        return
    for batch in table.to_batches():
        _check_responses(batch, address)
    counts = _counts(table)
    if counts != (shard.tokens, shard.cut):
        expected = f"{shard.tokens} tokens, {shard.cut} cut responses"
        raise _damaged(address, f"it has {counts[0]} tokens, {counts[1]} cut responses; its manifest says {expected}")


def _validate(data: pa.Table | pa.ChunkedArray, address: str) -> None:
    """Checks offsets, and that text is UTF-8."""
    try:
        data.validate(full=True)
    except (pa.ArrowException, ValueError) as error:
        raise _damaged(address, str(error).splitlines()[0]) from error


def _metadata(table: pa.Table) -> dict[str, Any]:
    try:
        metadata = json.loads((table.schema.metadata or {}).get(b"distillkit", b"{}"))
    except (ValueError, RecursionError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _has_null(array: pa.Array) -> bool:
    if array.null_count:
        return True
    if pa.types.is_list(array.type):
        return _has_null(array.values)
    if pa.types.is_struct(array.type):
        return any(_has_null(array.field(index)) for index in range(array.type.num_fields))
    return False


def _check_responses(batch: pa.RecordBatch, address: str) -> None:
    token_offsets, token_ids = _lists(batch.column("token_ids"))
    offsets, log_probs = _lists(batch.column("log_probs"))
    lengths, num_log_probs = np.diff(token_offsets), np.diff(offsets)
    if len(token_ids) and token_ids.min() < 0:
        raise _damaged(address, "a token id is negative")
    if ((num_log_probs != lengths) & (num_log_probs != 0)).any():
        raise _damaged(address, "a response has fewer or more log-probabilities than tokens")
    if len(log_probs) and not (np.isfinite(log_probs).all() and log_probs.max() <= LARGEST_LOG_PROB):
        raise _damaged(address, "a log-probability is not finite or above 0")
    if not pc.all(pc.is_in(batch.column("finish"), _FINISHES)).as_py():
        raise _damaged(address, "a response ended neither by stop nor by length")


def _counts(table: pa.Table) -> tuple[int, int]:
    """Numbers of tokens, and of responses that were cut off."""
    tokens = sum(len(chunk.values) for chunk in table["token_ids"].chunks)
    return tokens, pc.sum(pc.equal(table["finish"], "length")).as_py()


def _lists(column: pa.Array) -> tuple[NDArray[np.int32], NDArray[Any]]:
    """Offsets `[R + 1]` and values of a column of lists of numbers."""
    return column.offsets.to_numpy(), column.values.to_numpy()


def _damaged(address: str, reason: str) -> StoreError:
    return StoreError(f"{address} is damaged ({reason}): restore it or remove the store.")
