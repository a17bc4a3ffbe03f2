"""Turns of a row in one form: role and content, whatever the chat format that they are written in."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distillkit.errors import DataError
from distillkit.types import Message

ROLES = ("system", "user", "assistant", "tool")

ROLE_NAMES = {
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_call": "assistant",
}
"""Other names of the roles, in OpenAI's files and ShareGPT's."""

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Turn:
    """A message of a row and its location.

    Args:
        message: The message with `role` and `content`, and its other keys; a tool call has OpenAI's form.
        origin: Its location for error messages.
    """

    message: Mapping[str, object]
    origin: str


def turns_of(value: object, origin: str) -> list[Turn]:
    """The turns of a list of messages, or of its JSON text.

    Raises:
        DataError: If it is no list of objects with role and content, or with from and value.
    """
    messages = _parsed(value, origin) if isinstance(value, str) and value.lstrip().startswith("[") else value
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{origin} must be a list of messages with role and content, got {describe(value)}.")
    return [_turn(message, f"{origin}, turn {number}") for number, message in enumerate(messages, start=1)]


def _turn(message: object, origin: str) -> Turn:
    """A message with its role and content under these names."""
    keys = dict(message) if isinstance(message, Mapping) else {}
    if "role" not in keys and "from" in keys:
        keys["role"] = keys.pop("from")
        keys |= {"content": keys.pop("value")} if "value" in keys and "content" not in keys else {}
    role, calls = keys.get("role"), not is_empty(keys.get("tool_calls"))
    if calls and keys.get("content") is None:
        keys["content"] = ""
    if "role" not in keys or "content" not in keys:
        raise DataError(f"{origin} must be an object with role and content, got {describe(message)}.")
    if role == "function_call":  # ShareGPT's: the call is the value
        keys |= {"tool_calls": keys["content"], "content": ""}
    if isinstance(role, str):
        keys["role"] = ROLE_NAMES.get(role, role)
    if isinstance(keys["content"], list):
        keys["content"] = _joined(keys["content"], origin)
    return Turn({"role": keys.pop("role"), "content": keys.pop("content"), **keys}, origin)


def _joined(parts: list[object], origin: str) -> str:
    """The text of a content in parts, joined as they are."""
    texts = []
    for number, part in enumerate(parts, start=1):
        values = {key: value for key, value in part.items() if not is_empty(value)} if isinstance(part, Mapping) else {}
        kind = values.pop("type", "text")
        if kind != "text" or values.keys() - {"text"} or not isinstance(part, Mapping):
            raise DataError(f"{origin}, part {number} is no text but {describe(part)}; only texts can be trained on.")
        texts.append(text_of(values.get("text", ""), "system", f"{origin}, part {number}"))
    return "".join(texts)


def tool_calls(value: object, origin: str) -> str:
    """The calls of an assistant's turn as JSON in OpenAI's form, with arguments as an object, as chat templates read.

    Args:
        value: A list of calls, one call, or its JSON text; a call is `{name, arguments}`, or has it as `function`.
        origin: The location for error messages.

    Raises:
        DataError: If it is none of these.
    """
    calls = _parsed(value, origin) if isinstance(value, str) else value
    form = []
    for call in calls if isinstance(calls, list) else [calls]:
        keys = {key: one for key, one in call.items() if not is_empty(one)} if isinstance(call, Mapping) else {}
        function = keys.pop("function", None)
        if function is None:
            function = {name: keys.pop(name) for name in ("name", "arguments") if name in keys}
        arguments = function.get("arguments", {}) if isinstance(function, Mapping) else None
        arguments = _parsed(arguments, origin) if isinstance(arguments, str) else arguments
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or arguments is None:
            raise DataError(f"{origin} must have a name and arguments, got {describe(call)}.")
        if unused := sorted((keys.keys() - {"id", "type", "index"}) | (function.keys() - {"name", "arguments"})):
            raise DataError(f"{origin} has keys that would have no effect: {', '.join(map(repr, unused))[:500]}.")
        identity = {"id": keys["id"]} if "id" in keys else {}
        form.append(identity | {"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return _json(form, origin)


def tools_of(value: object, origin: str) -> str:
    """The tools of a row as JSON: a list of objects, or its JSON text.

    Raises:
        DataError: If it is none of these, or a tool has no name.
    """
    tools = _parsed(value, origin) if isinstance(value, str) else value
    if not isinstance(tools, list):
        raise DataError(f"{origin} must be a list of functions, got {describe(value)}.")
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f"{origin} must be a list of functions with a name, got {describe(tool)}.")
    return _json([_without_null(tool) for tool in tools], origin)


def _without_null(value: object) -> object:
    """A value without keys of null, which Parquet adds to a row where only others have them."""
    if isinstance(value, Mapping):
        return {key: _without_null(one) for key, one in value.items() if one is not None}
    return [_without_null(one) for one in value] if isinstance(value, list) else value


def api_request(messages: Sequence[Message]) -> dict[str, object]:
    """The messages, and the tools if there are any, in the form of OpenAI's chat interface."""
    turns = []
    for message in messages:
        keys: dict[str, object] = {key: value for key, value in message.items() if key != "tools"}
        if "tool_calls" in message:
            calls = json.loads(message["tool_calls"])
            for call in calls:
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            keys["tool_calls"] = calls
        turns.append(keys)
    tools = {"tools": json.loads(messages[0]["tools"])} if "tools" in messages[0] else {}
    return {"messages": turns, **tools}


def function_names(text: str) -> list[str]:
    """The names of the functions in the JSON of tools or of tool calls."""
    return [str(one.get("function", one)["name"]) for one in json.loads(text)]


def _json(value: object, origin: str) -> str:
    try:
        return text_of(json.dumps(value, ensure_ascii=False, separators=(",", ":")), "system", origin)
    except (TypeError, ValueError) as error:  # a date or bytes of Parquet
        raise DataError(f"{origin} has a value that JSON can't hold ({error}); write texts and numbers.") from error


def _parsed(text: str, origin: str) -> object:
    """The value of a JSON text."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{origin} is not valid JSON ({error}), got {describe(text)}; write a list.") from error


def text_of(content: object, role: str, origin: str) -> str:
    """A text of a turn, checked.

    Raises:
        DataError: If it is no text, empty, or has half of a surrogate pair.
    """
    if not isinstance(content, str):
        raise DataError(f"{origin} must be a text, got {describe(content)}; write one string.")
    # An empty system turn is valid: without it, a template might add its default system prompt. So is no result.
    if not content.strip() and role not in ("system", "tool"):
        noun, omission = ("response", "response out (null in JSON)") if role == "assistant" else ("prompt", "row out")
        raise DataError(f"{origin} is an empty {noun}; write the text or leave the {omission}.")
    if (half := _SURROGATE.search(content)) is not None:
        raise DataError(
            f"{origin} has half of a surrogate pair, {half[0]!a}, at character {half.start() + 1}, which no text can "
            "hold; write the whole character."
        )
    return content


def check_order(role: str, before: str | None, origin: str) -> None:
    """Refuses a turn that can't follow the one before it.

    Raises:
        DataError: If it can't.
    """
    if role == before != "tool":
        raise DataError(f"{origin} is a second {role} turn in a row; join the two or write the turn between them.")
    if role in ("assistant", "tool") and before in (None, "system"):
        name = "an assistant" if role == "assistant" else "a tool"
        raise DataError(f"{origin} is {name} turn with no user turn before it; start with the user's turn.")
    if role == "tool" and before == "user":
        raise DataError(f"{origin} is a tool turn after a user's; write the assistant's call between them.")
    if role == "system" and before is not None:
        raise DataError(f"{origin} is a system turn after another turn; put it first or leave it out.")


def is_empty(value: object) -> bool:
    """True for what files of one schema for all rows put where a row has nothing. False is a value: `loss: false`."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def shorten(value: object) -> str:
    """The start of a value, for messages."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def describe(value: object) -> str:
    """The start of a value and its type, for messages."""
    return f"{value!r:.40} ({type(value).__name__})"
