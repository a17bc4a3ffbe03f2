"""Readers of data files: rows with their location. Every error names the file and the line or row.

A reader takes the file and its name for error messages.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from distillkit.errors import DataError, one_line

if TYPE_CHECKING:
    import pyarrow as pa

Rows = Iterator[tuple[str, object]]
"""The location of a row in its file, such as `line 7`, and its content, or the `DataError` that says what is wrong."""


@contextmanager
def _opened(file: Path, name: str) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked if `name` ends in .gz or .zst.

    Raises:
        DataError: If what is packed is damaged.
    """
    suffix = name.lower().rpartition(".")[2]
    if suffix == "zst":
        import pyarrow as pa  # slow to import, and other files don't need it

        unpacked: Any = io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(file)), "zstd"))
    else:
        unpacked = gzip.open(file, "rb") if suffix == "gz" else file.open("rb")  # noqa: SIM115  closed below
    with unpacked as lines:
        try:
            yield lines
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise _DamagedError(one_line(str(error), 300)) from error
        except OSError as error:
            if suffix != "zst":
                raise
            raise _DamagedError(one_line(str(error), 300)) from error


class _DamagedError(Exception):
    """A compressed file can't be unpacked."""


def jsonl_rows(file: Path, name: str) -> Rows:
    """The values in a file with one JSON value per line, compressed if `name` ends in .gz or .zst."""
    line_number, blank = 0, 0
    try:
        with _opened(file, name) as lines:
            # Bytes, since a text file would also break lines at a lone carriage return.
            for line_number, line in enumerate(lines, start=1):
                if not line.strip():
                    blank = blank or line_number
                    continue
                if blank:  # blank lines at the end are no rows
                    problem = f"{name} line {blank} is blank; delete the line, it may hide a lost row."
                    yield f"line {blank}", DataError(problem)
                    blank = 0
                yield f"line {line_number}", _json(line, f"{name} line {line_number}", line_number == 1)
    except _DamagedError as error:
        raise DataError(f"{name} is damaged after line {line_number} ({error}); compress or copy it again.") from error


def json_rows(file: Path, name: str) -> Rows:
    """The values of a JSON array; or those of a file with one JSON value per line, which many call .json too."""
    try:
        with _opened(file, name) as lines:
            content = lines.read()
    except _DamagedError as error:
        raise DataError(f"{name} is damaged ({error}); compress or copy it again.") from error
    text = content.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.startswith(b"[") and not isinstance(rows := _json(content, name, True, "a list of objects"), DataError):
        yield from ((f"row {row_number}", row) for row_number, row in enumerate(cast(list[object], rows), start=1))
    elif text.startswith(b"[") and not text.partition(b"\n")[0].rstrip().endswith(b"]"):
        assert isinstance(rows, DataError)
        raise rows
    elif text.startswith(b"{") and isinstance(value := _json(content, name, True), dict) and b"\n" in text.rstrip():
        keys = ", ".join(map(repr, value))[:500]
        raise DataError(f"{name} is one object, with the keys {keys}; write a list of objects, one for each row.")
    else:
        yield from jsonl_rows(file, name)


def _json(content: bytes, origin: str, is_first: bool, form: str = "one object per line") -> object:
    """The JSON value of a line or a file, or the error that says why there is none."""
    try:
        text = content.strip().decode("utf-8-sig" if is_first else "utf-8")
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        reason, advice = f"is not valid JSON: {error.msg} at {line}column {error.colno}", f"write {form}"
    except UnicodeDecodeError as error:
        reason, advice = f"is not UTF-8 ({error.reason})", "save the file as UTF-8"
    except RecursionError:
        reason, advice = "is nested too deeply", "write one object with texts or messages per line"
    except ValueError as error:  # a key twice, or a number of more digits than Python reads
        reason, advice = f"can't be read ({one_line(str(error), 300)})", "correct it"
    return DataError(f"{origin} {reason}; {advice}.")


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
    """The rows of a CSV file, or a TSV file by its name, as dictionaries of texts, keyed by its header."""
    row_number = 0
    csv.field_size_limit(2**31 - 1)  # by default 131,072 characters, fewer than a long document has
    dialect = csv.excel_tab if ".tsv" in name.lower()[-8:] else csv.excel
    try:
        with _opened(file, name) as content, io.TextIOWrapper(content, "utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, dialect, strict=True)
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
    except _DamagedError as error:
        raise DataError(f"{name} is damaged after row {row_number} ({error}); compress or copy it again.") from error


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
    ".ndjson": jsonl_rows,
    ".jsonlines": jsonl_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".parquet": parquet_rows,
}
"""Readers by the end of a file's name; all but Parquet also unpack files that end in .gz or .zst besides."""


def reader_of(name: str) -> Callable[[Path, str], Rows] | None:
    """The reader for a file called `name`; None if its format is unknown."""
    lower = name.lower()
    plain = lower.removesuffix(".gz") if lower.endswith(".gz") else lower.removesuffix(".zst")
    suffix = next((suffix for suffix in READERS if plain.endswith(suffix)), "")
    return None if suffix == ".parquet" and plain != lower else READERS.get(suffix)
