"""Readers of data files: rows with their location. Every error names the file and the line or row.

A reader takes the file and its name for error messages.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distillkit.errors import DataError, one_line

if TYPE_CHECKING:
    import pyarrow as pa

Rows = Iterator[tuple[str, object]]
"""The location of a row in its file, such as `line 7`, and its content, or the `DataError` that says what is wrong."""


def jsonl_rows(file: Path, name: str) -> Rows:
    """The values in a file with one JSON value per line, compressed if `name` ends in .gz."""
    line_number, blank = 0, 0
    try:
        with gzip.open(file, "rb") if name.lower().endswith(".gz") else file.open("rb") as lines:
            # Bytes, since a text file would also break lines at a lone carriage return.
            for line_number, line in enumerate(lines, start=1):
                if not line.strip():
                    blank = blank or line_number
                    continue
                if blank:  # blank lines at the end are no rows
                    problem = f"{name} line {blank} is blank; delete the line, it may hide a lost row."
                    yield f"line {blank}", DataError(problem)
                    blank = 0
                yield f"line {line_number}", _json(line, line_number, name)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{name} is damaged after line {line_number} ({one_line(str(error), 300)}); compress or copy it again."
        ) from error


def _json(line: bytes, line_number: int, name: str) -> object:
    """The JSON value of a line, or the error that says why there is none."""
    try:
        text = line.strip().decode("utf-8-sig" if line_number == 1 else "utf-8")
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        reason, advice = f"is not valid JSON: {error.msg} at column {error.colno}", "write one object per line"
    except UnicodeDecodeError as error:
        reason, advice = f"is not UTF-8 ({error.reason})", "save the file as UTF-8"
    except RecursionError:
        reason, advice = "is nested too deeply", "write one object with texts or messages per line"
    except ValueError as error:  # a key twice, or a number of more digits than Python reads
        reason, advice = f"can't be read ({one_line(str(error), 300)})", "correct it"
    return DataError(f"{name} line {line_number} {reason}; {advice}.")


def _without_repetition(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """The object of some keys and values.

    Raises:
        ValueError: If a key is there twice.
    """
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"it has the key {next(key for key in names if names.count(key) > 1)!r} twice")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_without_repetition)


def csv_rows(file: Path, name: str) -> Rows:
    """The rows of a CSV file as dictionaries of texts, keyed by its header."""
    row_number = 0
    csv.field_size_limit(2**31 - 1)  # by default 131,072 characters, fewer than a long document has
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, strict=True)
            header = next(reader, [])
            _refuse_repetition(header, name, "header")
            for row_number, cells in enumerate(reader, start=1):
                row: object = dict(zip(header, cells, strict=False))
                if len(cells) != len(header):
                    row = DataError(
                        f"{name} row {row_number} has {len(cells)} cells where the header has {len(header)}; quote "
                        "commas and line breaks within a cell, and delete blank lines."
                    )
                yield f"row {row_number}", row
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 after row {row_number} ({error.reason}); save it as UTF-8.") from error
    except csv.Error as error:
        raise DataError(f"{name} row {row_number + 1} is not valid CSV: {error}; correct it or use JSONL.") from error


def _refuse_repetition(columns: Sequence[str], name: str, noun: str) -> None:
    """Refuses a table of which two columns have the same name, since a row can hold only one of them."""
    if len(set(columns)) < len(columns):
        names = ", ".join(map(repr, columns))[:500]
        raise DataError(f"{name} names a column twice in its {noun}, {names}; rename one.")


def parquet_rows(file: Path, name: str) -> Rows:
    """The rows of a Parquet file as dictionaries."""
    import pyarrow as pa  # slow to import, and JSONL does not need it
    import pyarrow.parquet as pq

    first = 1
    try:
        with pq.ParquetFile(file) as table:
            _refuse_repetition(table.schema_arrow.names, name, "schema")
            for batch in table.iter_batches():
                yield from _batch_rows(batch, first, name)
                first += batch.num_rows
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: names of columns that are no UTF-8
        raise DataError(
            f"{name} is not a readable Parquet file ({one_line(str(error), 300)}); write or copy it again."
        ) from error


def _batch_rows(batch: "pa.RecordBatch", first: int, name: str) -> Rows:
    """The rows of a batch, numbered from `first`; an error for each that Python can't hold."""
    try:
        yield from ((f"row {row_number}", row) for row_number, row in enumerate(batch.to_pylist(), start=first))
    except (ValueError, OverflowError):  # bytes that are no UTF-8, or dates before year 1
        for index in range(batch.num_rows):
            row: object
            try:
                row = batch.slice(index, 1).to_pylist()[0]
            except (ValueError, OverflowError) as error:
                row = DataError(f"{name} row {first + index} can't be read ({one_line(str(error), 300)}); correct it.")
            yield f"row {first + index}", row


READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".jsonl": jsonl_rows,
    ".jsonl.gz": jsonl_rows,
    ".csv": csv_rows,
    ".parquet": parquet_rows,
}


def reader_of(name: str) -> Callable[[Path, str], Rows] | None:
    """The reader for a file called `name`; None if its format is unknown."""
    return next((reader for suffix, reader in READERS.items() if name.lower().endswith(suffix)), None)
