"""Encoded prompts on disk: what the same records, tokenizer and template gave before is read again, not computed.

Files lie in `encoded/` of the cache, each named by the content that it depends on and mapped into memory, so that the
processes of a machine share it. They may be removed at any time.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

import pyarrow as pa
from filelock import FileLock

from distillkit.data import chat as chat_code
from distillkit.data import encoding as encoding_code
from distillkit.data import template_spans as spans_code
from distillkit.data import turns as turns_code
from distillkit.data.encoding import BATCH, EncodeReport, Facts, Overlong, choose, encode_all, encode_batches, facts
from distillkit.data.records import OnError
from distillkit.data.template_spans import Ids, shared
from distillkit.errors import DataError, StoreError
from distillkit.remote.wheels import cache_dir
from distillkit.storage.atomic import atomic_path
from distillkit.storage.checksum import checksum
from distillkit.types import Prompt, Record, Tokenizer

_log = logging.getLogger(__name__)

CACHED_FROM = 2000
"""Records from which their encoding is kept: fewer take a second."""
LARGEST_CACHE = 8 * 2**30
"""Bytes of all files; the ones that were not used for the longest time are removed above."""

_MAGIC, _HEADER = b"distillkit-encoded ", 64
_ORIGIN = "<origin of the row>"
"""Stands for the file and line of a record in what is kept: the same rows may lie elsewhere."""

_FACTS = [("id", pa.string()), ("response", pa.string()), ("length", pa.int32())]
_FACTS += [("ended", pa.bool_()), ("inner_end", pa.bool_()), ("paired", pa.bool_())]
_FACTS += [("problem", pa.string())]
_IDS = [(name, pa.list_(pa.int32())) for name in ("input_ids", "reference_ids", "rejected_ids")]
_TEXTS = [("messages", pa.string()), ("reference", pa.string())]
_SCHEMA = pa.schema([*_FACTS, *_IDS, ("mask", pa.binary()), *_TEXTS])


class EncodedPrompts(Sequence[Prompt]):
    """Prompts in a file, each made when it is used.

    Args:
        batches: The file's batches of `BATCH` records.
        rows: Index of each prompt's record.
        ids: Id of each prompt.
        origins: Where each record comes from, by its index.
    """

    def __init__(
        self, batches: Sequence[pa.RecordBatch], rows: Sequence[int], ids: Sequence[str], origins: Sequence[str]
    ) -> None:
        self._batches, self._rows, self._ids, self._origins = batches, rows, ids, origins

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> "EncodedPrompts": ...
    def __getitem__(self, index: int | slice) -> "Prompt | EncodedPrompts":
        if isinstance(index, slice):
            return EncodedPrompts(self._batches, self._rows[index], self._ids[index], self._origins)
        row = self._rows[index]
        batch, offset = self._batches[row // BATCH], row % BATCH
        input_ids, reference_ids, rejected_ids = (
            shared(batch.column(name)[offset].values.to_numpy().tolist()) for name, _ in _IDS
        )
        mask = tuple(map(bool, batch.column("mask")[offset].as_py()))
        messages = tuple(json.loads(batch.column("messages")[offset].as_py()))
        reference = batch.column("reference")[offset].as_py()
        origin = self._origins[row]
        return Prompt(self._ids[index], messages, input_ids, reference_ids, mask, reference, origin, rejected_ids)


def encode_split(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    eos_ids: Ids,
    chat: bool,
    system: str | None,
    max_length: int,
    overlong: Overlong,
    responses: Literal["first", "all"],
    on_error: OnError,
) -> tuple[Sequence[Prompt], EncodeReport]:
    """`distillkit.data.encode_all`, whose results for many records are kept and read again.

    Args:
        records: The conversations, in their order.
        tokenizer: A transformers tokenizer.
        eos_ids: Token ids that end a turn.
        chat: Whether prompts go through the chat template.
        system: System message for the records that have none; None adds none.
        max_length: Largest number of tokens of a prompt, or of a prompt with its response.
        overlong: Treatment of a longer one: `error` stops, `drop` leaves it out and counts it.
        responses: Records to use of those with the same prompt: the first, or all that differ in their responses.
        on_error: Treatment of a record that can't be encoded: `stop` stops, `skip` leaves it out.

    Raises:
        DataError: As `encode_all`.
        ModelError: As `encode_all`.
    """
    key = _key(records, tokenizer, eos_ids, chat, system) if len(records) >= CACHED_FROM else None
    selection = max_length, overlong, responses, on_error
    if key is None:
        return encode_all(records, tokenizer, eos_ids, chat, system, *selection)
    batches = encode_batches((replace(record, origin=_ORIGIN) for record in records), tokenizer, eos_ids, chat, system)
    try:
        table = _stored_batches(
            cache_dir() / "encoded" / f"{key}.arrow", len(records), (_table(batch, eos_ids) for batch in batches)
        )
    except (OSError, StoreError) as error:
        _log.warning("The encoded prompts are not kept (%s); they are encoded anew at each start.", error)
        return encode_all(records, tokenizer, eos_ids, chat, system, *selection)
    origins = [record.origin for record in records]
    chosen, report = choose(_facts(table, origins), origins, *selection)
    return EncodedPrompts(table, list(chosen), list(chosen.values()), origins), report


def _table(results: Sequence[Prompt | DataError], eos_ids: Ids) -> pa.RecordBatch:
    """A batch of encoded records as a table."""
    rows: list[dict[str, Any]] = []
    for result in results:
        row: dict[str, Any] = facts(result, eos_ids)._asdict()
        if isinstance(result, Prompt):
            row |= {name: getattr(result, name) for name, _ in _IDS} | {"reference": result.reference}
            row |= {"mask": bytes(result.reference_mask), "messages": json.dumps(result.messages)}
        rows.append(row)
    return pa.RecordBatch.from_pylist(rows, _SCHEMA)


def _facts(batches: Iterable[pa.RecordBatch], origins: Sequence[str]) -> Iterator[Facts]:
    """The facts of each record."""
    names = iter(origins)
    for batch in batches:
        columns = [batch.column(name).to_pylist() for name, _ in _FACTS]
        for values in zip(*columns, strict=True):
            fact, origin = Facts(*values), next(names)
            yield fact._replace(problem=fact.problem.replace(_ORIGIN, origin)) if fact.problem else fact


def _stored_batches(file: Path, num_records: int, batches: Iterable[pa.RecordBatch]) -> list[pa.RecordBatch]:
    """The batches of a file, which are computed and written if there is none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):  # of all processes one encodes
        stored = _read(file)
        if stored is not None:
            _log.info("%d encoded prompts are read from %s", num_records, file)
            os.utime(file)
            return stored
        start = time.perf_counter()
        with atomic_path(file) as temporary:
            _write(temporary, batches)
        seconds = time.perf_counter() - start
        _log.info("%d prompts encoded in %.1f s, kept in %s", num_records, seconds, file)
        _bound(file)
        stored = _read(file)
    if stored is None:
        raise StoreError(f"{file} can't be read after it was written: check the disk.")
    return stored


def _write(file: Path, batches: Iterable[pa.RecordBatch]) -> None:
    """Writes batches after a header with their checksum."""
    with file.open("wb") as stream:
        stream.write(b" " * _HEADER)
        with pa.ipc.new_stream(stream, _SCHEMA) as writer:
            for batch in batches:
                writer.write_batch(batch)
    with pa.memory_map(str(file)) as content:
        value = checksum(memoryview(content.read_buffer())[_HEADER:])
    with file.open("r+b") as stream:
        stream.write((_MAGIC + value.encode()).ljust(_HEADER))


def _read(file: Path) -> list[pa.RecordBatch] | None:
    """The batches of a file, mapped into memory; None if there is none, or it is damaged."""
    if not file.is_file():
        return None
    try:
        content = pa.memory_map(str(file)).read_buffer()
        header, body = bytes(content[:_HEADER]), content.slice(_HEADER)
        if header != (_MAGIC + checksum(memoryview(body)).encode()).ljust(_HEADER):
            raise ValueError("its checksum differs")
        return list(pa.ipc.open_stream(body))
    except (pa.ArrowException, OSError, ValueError) as error:
        _log.warning("%s is damaged (%s); the prompts are encoded anew", file, error)
        return None


def _bound(newest: Path) -> None:
    """Removes the files that were not used for the longest time, as far as all of them are too large."""
    files = sorted(newest.parent.glob("*.arrow"), key=lambda file: file.stat().st_mtime, reverse=True)
    total = 0
    for file in [newest, *(file for file in files if file != newest)]:
        total += file.stat().st_size
        if total > LARGEST_CACHE and file != newest:
            file.unlink(missing_ok=True)  # a process that has it mapped goes on to read it


def _key(records: Iterable[Record], tokenizer: Tokenizer, eos_ids: Ids, chat: bool, system: str | None) -> str | None:
    """The name of the content that encoded prompts depend on; None if it can't be told."""
    backend, template = getattr(tokenizer, "backend_tokenizer", None), tokenizer.chat_template
    is_dated = isinstance(template, str) and "strftime_now" in template and "macro strftime_now" not in template
    if backend is None or is_dated:
        return None
    versions = [importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")]
    state = hashlib.sha256(backend.to_str().encode())
    for module in (chat_code, encoding_code, spans_code, turns_code):
        state.update(Path(str(module.__file__)).read_bytes())
    settings = [versions, template, dict(tokenizer.special_tokens_map), tokenizer.name_or_path, eos_ids, chat, system]
    state.update(json.dumps([*settings, type(tokenizer).__name__], default=str).encode())
    for record in records:
        content = [record.messages, sorted(record.untrained), record.ended, record.rejected]
        state.update(json.dumps(content).encode() + b"\n")
    return state.hexdigest()[:32]
