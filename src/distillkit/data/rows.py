"""Rows of data as checked conversations. A key of a row has its effect, or the row is refused: none is ignored."""

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

from distillkit.errors import DataError
from distillkit.types import Message, Record

ROLES = ("system", "user", "assistant")

METADATA = {
    *("id", "_id", "idx", "index", "uuid", "uid", "prompt_id", "message_id", "conversation_id", "__index_level_0__"),
    *("source", "dataset", "origin", "url", "license", "language", "lang", "category", "topic", "tags", "split"),
    *("date", "timestamp", "created", "created_at", "updated_at", "author", "model", "version", "comment", "notes"),
    *("metadata", "meta", "num_turns", "num_tokens", "length", "score", "difficulty"),
    *("writer", "round", "sampling", "generator", "token_ids", "log_probs"),  # of a store's exports
}
"""Keys that describe a row or a message. They have no effect, unless they are named as a column."""

_REASONING = ("reasoning_content", "reasoning", "thinking")
_MESSAGE_KEYS = ("role", "content", "weight", "train", *_REASONING)
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Columns:
    """Names of a row's columns.

    Args:
        prompt: Column with the user's prompt.
        response: Column with the response.
        messages: Column with a whole conversation.
        ignored: Columns, and keys of messages, that have no effect.
    """

    prompt: str = "prompt"
    response: str = "response"
    messages: str = "messages"
    ignored: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Turn:
    """A message of a row and its location."""

    message: Mapping[str, object]
    origin: str


def read_row(row: object, origin: str, columns: Columns) -> Record:
    """Checks a row and returns its conversation.

    Args:
        row: The row, a mapping from columns to values.
        origin: Its source and location for error messages.
        columns: The names of its columns.

    Raises:
        DataError: If the row is malformed, or has a column or a key of a message that would have no effect.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{origin} is not an object but {_describe(row)}; write one JSON object per line.")
    row = {key: value for key, value in row.items() if key not in columns.ignored}
    if columns.response == "response" and row.get("response") is None and "completion" in row:
        columns = replace(columns, response="completion")  # TRL's name
    if row.get(columns.messages) is not None:
        turns = _messages(row[columns.messages], f"{origin}, {columns.messages}")
        _check_repetition(row, turns, origin, columns)
    else:
        turns = _history(row.pop("history", None), f"{origin}, history")
        turns += _text_or_messages(_prompt(row, origin, columns), "user", f"{origin}, {columns.prompt}")
        answered = row.get(columns.response) is not None
        if turns[-1].message["role"] == "assistant" and not answered:
            raise DataError(
                f"{turns[-1].origin} is the start of an answer, which can't be continued; leave the turn out, or name "
                "a whole conversation with messages_column."
            )
        if answered:
            turns += _text_or_messages(row[columns.response], "assistant", f"{origin}, {columns.response}")
            if turns[-1].message["role"] == "user":
                raise DataError(f"{turns[-1].origin} is a user turn that ends a response; end it with an answer.")
    system = row.pop("system", None)
    if not _is_empty(system):
        turns.insert(0, _Turn(_message("system", system), f"{origin}, system"))
    finish = row.pop("finish", None)
    if finish not in (None, "stop", "length"):
        raise DataError(f"{origin} has the finish {_shorten(finish)}; use stop, or length for an answer that was cut.")
    used = (columns.prompt, columns.response, columns.messages)
    _refuse_unused(row, used, origin, "columns", "name the right columns with prompt_column and response_column")
    return _conversation(turns, origin, columns, finish != "length")


def _prompt(row: dict[str, object], origin: str, columns: Columns) -> object:
    """The prompt of a row. To an `instruction`, Alpaca's `input` is added."""
    prompt = row.get(columns.prompt)
    if prompt is None and columns.prompt in row:
        raise DataError(f"{origin}, {columns.prompt} is null; write the prompt or leave the row out.")
    if prompt is None:
        raise DataError(
            f"{origin} has neither {columns.prompt!r} nor {columns.messages!r}, only "
            f"{', '.join(map(repr, row))[:500] or 'nothing'}; name the right column with prompt_column or "
            "messages_column."
        )
    if columns.prompt == "instruction" and "input" in row:
        addition = row.pop("input")
        if not _is_empty(addition):
            return f"{_text(prompt, 'user', f'{origin}, instruction')}\n\n{_text(addition, 'user', f'{origin}, input')}"
    return prompt


def _text_or_messages(value: object, role: str, origin: str) -> list[_Turn]:
    """The turns of a prompt or a response: one if it is a text, several if it is a list."""
    return _messages(value, origin) if value and isinstance(value, list) else [_Turn(_message(role, value), origin)]


def _messages(value: object, origin: str) -> list[_Turn]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{origin} must be a list of messages with role and content, got {_describe(value)}.")
    turns = [_Turn(message, f"{origin}, turn {number}") for number, message in enumerate(value, start=1)]
    for turn in turns:
        if not isinstance(turn.message, Mapping) or "role" not in turn.message or "content" not in turn.message:
            raise DataError(f"{turn.origin} must be an object with role and content, got {_describe(turn.message)}.")
    return turns


def _message(role: str, content: object) -> dict[str, object]:
    return {"role": role, "content": content}


def _history(value: object, origin: str) -> list[_Turn]:
    """The turns of a history, a list of pairs of a prompt and its response."""
    if _is_empty(value):
        return []
    pairs = value if isinstance(value, list) else [None]
    turns = []
    for number, pair in enumerate(pairs, start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(f"{origin} must be a list of pairs of a prompt and its response, got {_describe(value)}.")
        for role, content in zip(("user", "assistant"), pair, strict=True):
            turns.append(_Turn(_message(role, content), f"{origin}, pair {number}"))
    return turns


def _check_repetition(row: Mapping[str, object], turns: Sequence[_Turn], origin: str, columns: Columns) -> None:
    """Refuses columns beside a conversation that don't repeat its first prompt or its last answer."""
    messages = [turn.message for turn in turns]
    first = next((message["content"] for message in messages if message["role"] == "user"), None)
    last = messages[-1]["content"] if messages[-1]["role"] == "assistant" else None
    for name, content in ((columns.prompt, first), (columns.response, last)):
        if row.get(name) not in (None, "", content, messages, messages[:-1], messages[-1:]):
            raise DataError(
                f"{origin} has {columns.messages!r} and another text in {name!r}; remove one of them, or name it in "
                "ignored_keys."
            )


def _refuse_unused(keys: Mapping[str, object], used: Container[str], origin: str, noun: str, advice: str) -> None:
    """Refuses keys with a value that would have no effect."""
    unused = [key for key, value in keys.items() if key not in used and key not in METADATA and not _is_empty(value)]
    if unused:
        raise DataError(
            f"{origin} has {noun} that would have no effect: {', '.join(map(repr, unused))[:500]}; {advice}, remove "
            "them, or list them in ignored_keys."
        )


def _is_empty(value: object) -> bool:
    """True for what files of one schema for all rows put where a row has nothing. False is a value: `loss: false`."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def _conversation(turns: Sequence[_Turn], origin: str, columns: Columns, ended: bool) -> Record:
    """The messages of one conversation, checked turn by turn."""
    messages: list[Message] = []
    untrained = set()
    for index, turn in enumerate(turns):
        role = turn.message["role"]
        if role not in ROLES:
            raise DataError(f"{turn.origin} has the unknown role {_shorten(role)}; use one of {', '.join(ROLES)}.")
        _check_order(str(role), messages[-1]["role"] if messages else None, turn.origin)
        message = {"role": str(role), "content": _text(turn.message["content"], str(role), turn.origin)}
        if len(turn.message) > 2:
            keys = {key: value for key, value in turn.message.items() if key not in columns.ignored}
            if not _is_trained(keys, str(role), turn.origin):
                untrained.add(index)
            if reasoning := _reasoning(keys, str(role), index == len(turns) - 1, turn.origin):
                message["reasoning_content"] = reasoning
            _refuse_unused(keys, _MESSAGE_KEYS, turn.origin, "keys", "correct them")
        messages.append(message)
    if messages[-1]["role"] == "system":
        raise DataError(f"{turns[-1].origin.partition(', turn')[0]} has no user turn; write the prompt to be answered.")
    if len(messages) - 1 in untrained:
        raise DataError(f"{origin} ends with an answer that is not trained on (weight 0); leave that turn out.")
    return Record(tuple(messages), origin, frozenset(untrained), ended)


def _check_order(role: str, before: str | None, origin: str) -> None:
    """Refuses a turn that can't follow the one before it."""
    if role == before:
        raise DataError(f"{origin} is a second {role} turn in a row; join the two or write the turn between them.")
    if role == "assistant" and before in (None, "system"):
        raise DataError(f"{origin} is an assistant turn with no user turn before it; start with the user's turn.")
    if role == "system" and before is not None:
        raise DataError(f"{origin} is a system turn after another turn; put it first or leave it out.")


def _is_trained(keys: Mapping[str, object], role: str, origin: str) -> bool:
    """True if a turn is trained on, as `weight` (OpenAI) and `train` (axolotl) say; by default an assistant's is."""
    values = {name: keys[name] for name in ("weight", "train") if keys.get(name) is not None}
    if any(value not in (0, 1) for value in values.values()):
        raise DataError(f"{origin} has the weight {_shorten(next(iter(values.values())))}; use 0 or 1 for a turn.")
    if len({bool(value) for value in values.values()}) > 1:
        raise DataError(f"{origin} has a weight and a train that contradict each other; leave one of them out.")
    trained = all(values.values()) if values else role == "assistant"
    if trained and role != "assistant":
        raise DataError(f"{origin} is a {role} turn to be trained on; only an assistant's turns are: set 0 or false.")
    return trained or role != "assistant"


def _reasoning(keys: Mapping[str, object], role: str, is_last: bool, origin: str) -> str:
    """The reasoning before an answer; empty if there is none."""
    texts = [keys[name] for name in _REASONING if not _is_empty(keys.get(name))]
    if not texts:
        return ""
    if role != "assistant" or not is_last or len(texts) > 1:
        raise DataError(
            f"{origin} has reasoning that would have no effect; only a last answer can have it, once: remove it, or "
            "cut the conversation there."
        )
    return _text(texts[0], role, f"{origin}, reasoning")


def _text(content: object, role: str, origin: str) -> str:
    """A text of a turn, checked."""
    if not isinstance(content, str):
        raise DataError(f"{origin} must be a text, got {_describe(content)}; write one string.")
    # An empty system turn is valid: without it, a template might add its default system prompt.
    if not content.strip() and role != "system":
        noun, omission = ("response", "response out (null in JSON)") if role == "assistant" else ("prompt", "row out")
        raise DataError(f"{origin} is an empty {noun}; write the text or leave the {omission}.")
    if (half := _SURROGATE.search(content)) is not None:
        raise DataError(
            f"{origin} has half of a surrogate pair, {half[0]!a}, at character {half.start() + 1}, which no text can "
            "hold; write the whole character."
        )
    return content


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _describe(value: object) -> str:
    return f"{value!r:.40} ({type(value).__name__})"
