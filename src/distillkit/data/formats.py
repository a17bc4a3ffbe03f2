"""Formats of rows: which columns of a row are its prompt, its response or its conversation."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal, cast

from distillkit.data.turns import is_empty
from distillkit.errors import DataError

Format = Literal["auto", "plain", "openai", "sharegpt", "alpaca", "preference", "trl"]
"""Format of a file's rows; `auto` tells it by the columns of each row."""

_SIGNS = {"openai": "messages", "sharegpt": "conversations", "alpaca": "instruction", "trl": "completion"}
"""Column that tells a format, and that a row of it must have."""

CONVERSATION_COLUMNS = ("conversations", "conversation")

METADATA = {
    *("id", "_id", "idx", "index", "uuid", "uid", "prompt_id", "message_id", "conversation_id", "__index_level_0__"),
    *("source", "dataset", "origin", "url", "license", "language", "lang", "category", "topic", "tags", "split"),
    *("date", "timestamp", "created", "created_at", "updated_at", "author", "model", "version", "comment", "notes"),
    *("metadata", "meta", "num_turns", "num_tokens", "length", "score", "difficulty"),
    *("score_chosen", "score_rejected", "parallel_tool_calls"),
    *("writer", "round", "sampling", "generator", "token_ids", "log_probs", "purpose"),  # of a store's exports
}
"""Keys that describe a row or a message. They have no effect, unless they are named as a column."""


@dataclass(frozen=True)
class Columns:
    """Names of a row's columns.

    Args:
        prompt: Column with the user's prompt.
        response: Column with the response.
        messages: Column with a whole conversation.
        ignored: Columns, and keys of messages, that have no effect.
        format: Format of the rows.
        chosen: Column with the better response of a pair.
        rejected: Column with the worse response of a pair.
        empty: Unknown keys that a row has without a value: `read_row` adds them.
    """

    prompt: str = "prompt"
    response: str = "response"
    messages: str = "messages"
    ignored: frozenset[str] = frozenset()
    format: Format = "auto"
    chosen: str = "chosen"
    rejected: str = "rejected"
    empty: set[str] = field(default_factory=set, compare=False)


def resolve(row: Mapping[str, object], origin: str, columns: Columns) -> Columns:
    """The columns of a row in its format, which `format` then names.

    Raises:
        DataError: If the row has the columns of two formats, or not those of the configured one.
    """
    names = frozenset(key for key, value in row.items() if not is_empty(value) and key not in columns.ignored)
    conversations = [name for name in dict.fromkeys((columns.messages, *CONVERSATION_COLUMNS)) if name in names]
    if row.get(columns.messages) is not None and not names & {columns.prompt, "instruction", columns.chosen}:
        conversations = conversations or [columns.messages]  # an empty one, which is refused
    if len(conversations) > 1:
        raise DataError(
            f"{origin} has two conversations, {conversations[0]!r} and {conversations[1]!r}; list one of them in "
            "ignored_keys."
        )
    resolved = replace(_resolve(names, "".join(conversations), columns), empty=columns.empty)
    sign = _SIGNS.get(columns.format, columns.chosen if columns.format == "preference" else None)
    if sign is not None and resolved.format != columns.format:
        raise DataError(
            f"{origin} is no row of the format {columns.format}: it has no {sign!r}, only "
            f"{', '.join(map(repr, row))[:500] or 'nothing'}; set data.format to auto, or correct the row."
        )
    return resolved


@lru_cache(maxsize=1024)
def _resolve(names: frozenset[str], conversation: str, columns: Columns) -> Columns:
    """The columns of a row with values in `names`, one of which may be a conversation."""
    pair = {columns.chosen, columns.rejected} - {columns.prompt, columns.response, columns.messages}
    is_alpaca = columns.prompt == "prompt" and "instruction" in names
    is_trl = columns.response == "response" and "response" not in names and "completion" in names
    fits = {
        "preference": len(pair) == 2 and bool(pair & names),
        "sharegpt": conversation in CONVERSATION_COLUMNS and conversation != columns.messages,
        "openai": conversation == columns.messages,
        "alpaca": is_alpaca and ("prompt" not in names or columns.format == "alpaca"),
        "trl": is_trl,
        "plain": True,
    }
    chosen = columns.format if fits.get(columns.format) else next(name for name, value in fits.items() if value)
    resolved = replace(columns, format=cast(Format, chosen))
    if chosen == "sharegpt":
        resolved = replace(resolved, messages=conversation)
    if chosen == "alpaca":
        has_output = columns.response == "response" and "response" not in names
        return replace(resolved, prompt="instruction", response="output" if has_output else columns.response)
    return replace(resolved, response="completion") if is_trl else resolved


def effects(row: Mapping[str, object], columns: Columns) -> str:
    """The effect of each column of a row, for the log.

    Args:
        row: A row that was read.
        columns: Its columns, resolved.
    """
    parts = {columns.prompt: "the prompt", columns.response: "the response", columns.messages: "the conversation"}
    if columns.format == "preference":
        parts |= {columns.chosen: "the response", columns.rejected: "the rejected response"}
    if columns.format == "alpaca":
        parts["input"] = "added to the prompt"
    parts |= {"system": "the system message", "finish": "its end"}
    parts |= {"history": "the list of earlier turns", "tools": "the list of tools"}
    used = [f"{name!r} is {parts[name]}" for name, value in row.items() if name in parts and not is_empty(value)]
    unused = [repr(name) for name, value in row.items() if name not in parts and not is_empty(value)]
    return ", ".join([*used, *([f"no effect: {', '.join(unused[:10])}"] if unused else [])])
