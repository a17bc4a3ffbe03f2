"""Rows of data as checked conversations. A key of a row has its effect, or the row is refused: none is ignored."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

from distillkit.data.formats import METADATA as METADATA
from distillkit.data.formats import Columns as Columns
from distillkit.data.formats import resolve
from distillkit.data.turns import (
    ROLES,
    Turn,
    check_order,
    describe,
    is_empty,
    shorten,
    text_of,
    tool_calls,
    tools_of,
    turns_of,
)
from distillkit.errors import DataError
from distillkit.types import Message, Record

_REASONING = ("reasoning_content", "reasoning", "thinking")
_MESSAGE_KEYS = ("role", "content", "weight", "train", "tool_calls", *_REASONING)
_TOOL_KEYS = ("name", "tool_call_id")
"""Keys of a tool's turn that chat templates read."""


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
        raise DataError(f"{origin} is not an object but {describe(row)}; write one JSON object per line.")
    row = {key: value for key, value in row.items() if key not in columns.ignored}
    columns = resolve(row, origin, columns)
    rejected: list[Turn] = []
    if columns.format in ("openai", "sharegpt"):
        turns = turns_of(row.pop(columns.messages), f"{origin}, {columns.messages}")
        _check_repetition(row, turns, origin, columns)
        used = {columns.prompt, columns.response}
    elif columns.format == "preference":
        turns, rejected = _pair(row, origin, columns)
        used = {columns.prompt}
    else:
        turns = _prompted(row, origin, columns)
        used = {columns.prompt, columns.response}
    system = row.pop("system", None)
    if not is_empty(system):
        turns.insert(0, Turn(_message("system", system), f"{origin}, system"))
    tools = row.pop("tools", None)
    finish = row.pop("finish", None)
    if finish not in (None, "stop", "length"):
        raise DataError(f"{origin} has the finish {shorten(finish)}; use stop, or length for an answer that was cut.")
    advice = "name the right columns with prompt_column and response_column"
    _refuse_unused(row, used, origin, "columns", advice, columns)
    record = _conversation(turns, origin, columns, finish != "length")
    if not is_empty(tools):
        record = _with_tools(record, tools_of(tools, f"{origin}, tools"))
    return _with_rejected(record, rejected, columns) if rejected else record


def _prompted(row: dict[str, object], origin: str, columns: Columns) -> list[Turn]:
    """The turns of a row with a prompt, and its response if there is one."""
    turns = _history(row.pop("history", None), f"{origin}, history")
    turns += _text_or_messages(_prompt(row, origin, columns), "user", f"{origin}, {columns.prompt}")
    response = row.get(columns.response)
    if columns.response == "output" and response == "":  # Alpaca's schema has it in each row
        response = None
    if turns[-1].message["role"] == "assistant" and response is None:
        raise DataError(
            f"{turns[-1].origin} is the start of an answer, which can't be continued; leave the turn out, or name "
            "a whole conversation with messages_column."
        )
    if response is not None:
        turns += _text_or_messages(response, "assistant", f"{origin}, {columns.response}")
        if turns[-1].message["role"] == "user":
            raise DataError(f"{turns[-1].origin} is a user turn that ends a response; end it with an answer.")
    return turns


def _pair(row: dict[str, object], origin: str, columns: Columns) -> tuple[list[Turn], list[Turn]]:
    """The conversations of a row that end with its better and with its worse response."""
    missing = [name for name in (columns.chosen, columns.rejected) if is_empty(row.get(name))]
    if missing:
        raise DataError(f"{origin} is half of a pair: it has no {missing[0]!r}; write it, or leave the row out.")
    chosen, rejected = row.pop(columns.chosen), row.pop(columns.rejected)
    if row.get(columns.messages) == chosen:
        row.pop(columns.messages)
    history = row.pop("history", None)
    conversations = []
    for name, value in ((columns.chosen, chosen), (columns.rejected, rejected)):
        turns = _text_or_messages(value, "assistant", f"{origin}, {name}")
        if turns[0].message["role"] in ("system", "user"):  # a conversation by itself
            _check_repetition(row, turns, origin, columns)
        else:
            before = _text_or_messages(_prompt(row, origin, columns), "user", f"{origin}, {columns.prompt}")
            turns = _history(history, f"{origin}, history") + before + turns
        if turns[-1].message["role"] != "assistant":
            raise DataError(f"{turns[-1].origin} ends with a {turns[-1].message['role']} turn; end it with an answer.")
        conversations.append(turns)
    return conversations[0], conversations[1]


def _with_rejected(record: Record, rejected: Sequence[Turn], columns: Columns) -> Record:
    """A record with the last answer of another conversation of the same prompt as its worse response."""
    worse = _conversation(rejected, record.origin, columns, record.ended)
    system = record.messages[:1] if record.messages[0]["role"] == "system" != worse.messages[0]["role"] else ()
    if _texts((*system, *worse.messages[:-1])) != _texts(record.messages[:-1]):
        raise DataError(
            f"{record.origin} has a {columns.chosen!r} and a {columns.rejected!r} that answer different prompts; "
            "write two answers to one prompt."
        )
    return replace(record, rejected=worse.messages[-1])


def _texts(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """The role and content of each message."""
    return [(message["role"], message["content"]) for message in messages]


def _with_tools(record: Record, tools: str) -> Record:
    """A record with its tools in the first message, where each part of the conversation has them."""
    return replace(record, messages=({**record.messages[0], "tools": tools}, *record.messages[1:]))


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
        if not is_empty(addition):
            instruction = text_of(prompt, "user", f"{origin}, instruction")
            return f"{instruction}\n\n{text_of(addition, 'user', f'{origin}, input')}"
    return prompt


def _text_or_messages(value: object, role: str, origin: str) -> list[Turn]:
    """The turns of a prompt or a response: one if it is a text, several if it is a list."""
    return turns_of(value, origin) if value and isinstance(value, list) else [Turn(_message(role, value), origin)]


def _message(role: str, content: object) -> dict[str, object]:
    return {"role": role, "content": content}


def _history(value: object, origin: str) -> list[Turn]:
    """The turns of a history, a list of pairs of a prompt and its response."""
    if is_empty(value):
        return []
    pairs = value if isinstance(value, list) else [None]
    turns = []
    for number, pair in enumerate(pairs, start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(f"{origin} must be a list of pairs of a prompt and its response, got {describe(value)}.")
        for role, content in zip(("user", "assistant"), pair, strict=True):
            turns.append(Turn(_message(role, content), f"{origin}, pair {number}"))
    return turns


def _check_repetition(row: Mapping[str, object], turns: Sequence[Turn], origin: str, columns: Columns) -> None:
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


def _refuse_unused(
    keys: Mapping[str, object], used: Container[str], origin: str, noun: str, advice: str, columns: Columns
) -> None:
    """Refuses keys with a value that would have no effect, and notes those without one."""
    unknown = [key for key in keys if key not in used and key not in METADATA]
    unused = [key for key in unknown if not is_empty(keys[key])]
    if unused:
        raise DataError(
            f"{origin} has {noun} that would have no effect: {', '.join(map(repr, unused))[:500]}; {advice}, remove "
            "them, or list them in ignored_keys."
        )
    columns.empty.update(f"{key!r} of a message" if noun == "keys" else repr(key) for key in unknown)


def _conversation(turns: Sequence[Turn], origin: str, columns: Columns, ended: bool) -> Record:
    """The messages of one conversation, checked turn by turn."""
    messages: list[Message] = []
    untrained = set()
    for index, turn in enumerate(turns):
        role = turn.message["role"]
        if role not in ROLES:
            raise DataError(f"{turn.origin} has the unknown role {shorten(role)}; use one of {', '.join(ROLES)}.")
        check_order(str(role), messages[-1]["role"] if messages else None, turn.origin)
        keys = {key: value for key, value in turn.message.items() if key not in columns.ignored}
        calls = _calls(keys, str(role), turn.origin)
        text_role = "tool" if calls else str(role)  # beside a call, an answer may have no text
        message = {"role": str(role), "content": text_of(turn.message["content"], text_role, turn.origin), **calls}
        if len(turn.message) > 2:
            if not _is_trained(keys, str(role), turn.origin):
                untrained.add(index)
            if reasoning := _reasoning(keys, str(role), index == len(turns) - 1, turn.origin):
                message["reasoning_content"] = reasoning
            used = (*_MESSAGE_KEYS, *_TOOL_KEYS) if role == "tool" else _MESSAGE_KEYS
            _refuse_unused(keys, used, turn.origin, "keys", "correct them", columns)
        messages.append(message)
    if messages[-1]["role"] == "system":
        raise DataError(f"{turns[-1].origin.partition(', turn')[0]} has no user turn; write the prompt to be answered.")
    if len(messages) - 1 in untrained:
        raise DataError(f"{origin} ends with an answer that is not trained on (weight 0); leave that turn out.")
    return Record(tuple(messages), origin, frozenset(untrained), ended)


def _calls(keys: Mapping[str, object], role: str, origin: str) -> dict[str, str]:
    """The tool calls of an assistant's turn, or the names that a tool's turn has; as texts, for chat templates."""
    if role == "tool":
        return {key: text_of(keys[key], role, f"{origin}, {key}") for key in _TOOL_KEYS if not is_empty(keys.get(key))}
    if is_empty(keys.get("tool_calls")):
        return {}
    if role != "assistant":
        raise DataError(f"{origin} is a {role} turn with tool calls, which only an assistant's can have; remove them.")
    return {"tool_calls": tool_calls(keys["tool_calls"], f"{origin}, tool_calls")}


def _is_trained(keys: Mapping[str, object], role: str, origin: str) -> bool:
    """True if a turn is trained on, as `weight` (OpenAI) and `train` (axolotl) say; by default an assistant's is."""
    values = {name: keys[name] for name in ("weight", "train") if keys.get(name) is not None}
    if any(value not in (0, 1) for value in values.values()):
        raise DataError(f"{origin} has the weight {shorten(next(iter(values.values())))}; use 0 or 1 for a turn.")
    if len({bool(value) for value in values.values()}) > 1:
        raise DataError(f"{origin} has a weight and a train that contradict each other; leave one of them out.")
    trained = all(values.values()) if values else role == "assistant"
    if trained and role != "assistant":
        raise DataError(f"{origin} is a {role} turn to be trained on; only an assistant's turns are: set 0 or false.")
    return trained or role != "assistant"


def _reasoning(keys: Mapping[str, object], role: str, is_last: bool, origin: str) -> str:
    """The reasoning before an answer; empty if there is none."""
    texts = [keys[name] for name in _REASONING if not is_empty(keys.get(name))]
    if not texts:
        return ""
    if role != "assistant" or not is_last or len(texts) > 1:
        raise DataError(
            f"{origin} has reasoning that would have no effect; only a last answer can have it, once: remove it, or "
            "cut the conversation there."
        )
    return text_of(texts[0], role, f"{origin}, reasoning")
