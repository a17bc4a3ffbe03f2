"""Data files -> rows, each with the place where it stands. Every error names the file and the line or row.

A reader takes the file and the name that errors call it by.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from distillkit.errors import DataError

Rows = Iterator[tuple[str, Any]]
"""Where a row stands in its file, such as `line 7`, and what it holds."""


def jsonl_rows(file: Path, name: str) -> Rows:
    """The values in a file with one JSON value per line, compressed if `name` ends in .gz."""
    number = 0
    try:
        with gzip.open(file, "rb") if name.lower().endswith(".gz") else file.open("rb") as lines:
            # Bytes, since a text file would also break lines at a lone carriage return.
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    raise DataError(f"{name} line {number} is blank; delete the line, it may hide a lost row.")
                yield f"line {number}", json.loads(line.strip().decode("utf-8-sig" if number == 1 else "utf-8"))
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at column {error.colno}"
        raise DataError(f"{name} line {number} is not valid JSON: {reason}; write one object per line.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{name} line {number} is not UTF-8 ({error.reason}); save the file as UTF-8.") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{name} is damaged after line {number} ({error}); compress or copy it again.") from error


def csv_rows(file: Path, name: str) -> Rows:
    """The rows of a CSV file as dictionaries of texts, keyed by its header."""
    number = 0
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, strict=True)
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise DataError(f"{name} names a column twice in its header, {', '.join(header)}; rename one.")
            for number, cells in enumerate(reader, start=1):
                if len(cells) != len(header):
                    raise DataError(
                        f"{name} row {number} has {len(cells)} cells where the header has {len(header)}; quote commas "
                        "and line breaks within a cell, and delete blank lines."
                    )
                yield f"row {number}", dict(zip(header, cells, strict=True))
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 after row {number} ({error.reason}); save it as UTF-8.") from error
    except csv.Error as error:
        raise DataError(f"{name} row {number + 1} is not valid CSV: {error}; correct it or use JSONL.") from error


def parquet_rows(file: Path, name: str) -> Rows:
    """The rows of a Parquet file as dictionaries."""
    import pyarrow as pa  # slow to import, and JSONL does not need it
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            rows = (row for batch in table.iter_batches() for row in batch.to_pylist())
            yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))
    except pa.ArrowException as error:
        raise DataError(f"{name} is not a readable Parquet file ({error}); write or copy it again.") from error


READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".jsonl": jsonl_rows,
    ".jsonl.gz": jsonl_rows,
    ".csv": csv_rows,
    ".parquet": parquet_rows,
}


def reader_of(name: str) -> Callable[[Path, str], Rows] | None:
    """The reader for a file called `name`; None if its format is unknown."""
    return next((reader for suffix, reader in READERS.items() if name.lower().endswith(suffix)), None)
