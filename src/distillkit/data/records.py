"""Sources of prompts: files, wheels and hub datasets as checked conversations.

Every error names the file and the line or row.
"""

import logging
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Literal

from distillkit.data.locations import Choice, check_choice, check_path, local_files, name_of, rows_of
from distillkit.data.rows import Columns, read_row
from distillkit.errors import ConfigError, DataError, check_range
from distillkit.interfaces import PromptSource
from distillkit.types import Record

_log = logging.getLogger(__name__)

Invalid = Literal["error", "drop"]

MAX_LISTED = 20
"""Rows left out that the log lists one by one."""


class Source(PromptSource):
    """Prompts, with or without responses, from a file or a dataset.

    Args:
        path: A .jsonl, .jsonl.gz, .csv or .parquet file, a pattern such as `data/*.jsonl` for several,
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
        invalid: Treatment of rows that can't be used: `error` stops, `drop` leaves them out, counts and lists them.
        revision: Branch, tag or commit of a hub dataset; null is its main branch.

    Raises:
        ConfigError: If `limit` is below 1, the list is empty, `split` or `hub_config` is set for a file, or `revision`
            for anything but a hub dataset.
    """

    invalid: Invalid = "error"

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
        invalid: Invalid = "error",
        revision: str | None = None,
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
        self.invalid = invalid
        self.revision = revision

    def check(self) -> None:
        """Checks the path without reading or downloading anything.

        Raises:
            ConfigError: If a wheel is not named in the required form.
            DataError: If a file is missing or has an unknown format, or a pattern matches no file.
        """
        for path in self.paths:
            check_path(path)

    def records(self) -> list[Record]:
        """Reads and checks the rows, in their order.

        Raises:
            DataError: If the source or a row is malformed, or there are no rows.
        """
        self.check()
        columns = Columns(self.prompt_column, self.response_column, self.messages_column, frozenset(self.ignored_keys))
        records: list[Record] = []
        problems: list[str] = []
        names: set[str] = set()
        rows = chain.from_iterable(rows_of(path, self.choice) for path in self.paths)
        for origin, row in islice(rows, self.limit):
            try:
                if isinstance(row, DataError):
                    raise row
                records.append(read_row(row, origin, columns))
            except DataError as error:
                if self.invalid == "error":
                    raise
                problems.append(str(error))
            except RecursionError as error:
                problem = f"{origin} is nested too deeply; write texts or messages."
                if self.invalid == "error":
                    raise DataError(problem) from error
                problems.append(problem)
            names.update(row if isinstance(row, Mapping) else ())
        if not records and problems:
            raise DataError(f"Every row of {self._name} is malformed. {problems[0]}")
        if not records:
            raise DataError(f"{self._name} has no rows; give it at least one prompt or choose another file.")
        self._check_columns(names)
        log_left_out(self._name, problems, len(records) + len(problems))
        return records

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


def log_left_out(name: str, problems: Sequence[str], total: int) -> None:
    """Counts and lists rows that were left out.

    Args:
        name: Name of their source or split.
        problems: The error of each.
        total: Number of rows, with those left out.
    """
    if not problems:
        return
    _log.warning("%s: %d of %d rows are left out", name, len(problems), total)
    for problem in problems[:MAX_LISTED]:
        _log.warning("left out: %s", problem)
    if len(problems) > MAX_LISTED:
        _log.warning("left out: %d more", len(problems) - MAX_LISTED)
