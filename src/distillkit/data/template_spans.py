"""Spans of the assistant's turns in the rendered text of a chat template, and in its tokens.

Spans come from positions in the text, never from token ids: they are correct when padding and end of turn are the same
token, when the template trims the content, and when a user quotes a special token.
"""

import json
import re
from collections.abc import Generator, Iterable, Sequence
from itertools import accumulate, pairwise
from typing import TypeVar

from jinja2 import TemplateError

from distillkit.data.turns import function_names
from distillkit.errors import DataError
from distillkit.types import Message, Tokenizer

Ids = tuple[int, ...]

_QUESTION, _ANSWER = "QZXJWVKQ", "WVKQZXJA"
"""Contents of messages that no template has in its text."""


_OPENING = re.compile(r"\s*([<\[])([\w:]+[>\]])")
"""The tag that opens a thought, such as `<think>` or `[THINK]`."""


class ClosedThoughtError(DataError):
    """A chat template writes a closed thought before an answer that begins with one."""


def render(messages: Sequence[Message], tokenizer: Tokenizer, generation_prompt: bool, origin: str) -> str:
    """Renders the messages with the tokenizer's chat template.

    Raises:
        DataError: If the template refuses them.
    """
    tools = {"tools": json.loads(messages[0]["tools"])} if messages and "tools" in messages[0] else {}
    try:
        text: str = tokenizer.apply_chat_template(
            [_for_template(message) for message in messages],
            tokenize=False,
            add_generation_prompt=generation_prompt,
            **tools,
        )
    except Exception as error:  # a template is a program: it may raise anything
        reason = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}".rstrip(": ")
        raise DataError(
            f"{origin} is refused by the chat template of {tokenizer.name_or_path} ({reason}): change the messages or "
            "the template."
        ) from error
    return text


def _for_template(message: Message) -> dict[str, object]:
    """A message with its reasoning under each of the names by which templates call it, and its calls as objects."""
    reasoning, calls = message.get("reasoning_content"), message.get("tool_calls")
    keys: dict[str, object] = {key: value for key, value in message.items() if key != "tools"}
    keys |= {"reasoning": reasoning, "thinking": reasoning} if reasoning else {}
    return keys | ({"tool_calls": json.loads(calls)} if calls else {})


def require_written(
    messages: Sequence[Message], text: str, tokenizer: Tokenizer, generation_prompt: bool, origin: str
) -> None:
    """Refuses a chat template that renders a message as nothing.

    A message that the text does not show may still have an effect, such as a system message that switches thinking off
    or an earlier answer whose thought is left out: then another one in its place gives another text.

    Raises:
        DataError: If a message has no effect on the text, or a tool or the call of one is not in it.
    """
    _require_tools(messages, text, tokenizer, origin)
    for index, message in enumerate(messages):
        if message["content"].strip() in text:
            continue
        replaced = list(messages)
        replaced[index] = {**message, "content": _QUESTION}
        try:
            unchanged = render(replaced, tokenizer, generation_prompt, origin) == text
        except DataError:  # it looks at the content
            continue
        if unchanged:
            raise DataError(
                f"{origin}: the chat template of {tokenizer.name_or_path} does not write the {message['role']} message "
                f"{message['content'].strip()[:40]!r}: choose one that does (`model.student.chat_template`), or leave "
                "the message out."
            )


def _require_tools(messages: Sequence[Message], text: str, tokenizer: Tokenizer, origin: str) -> None:
    """Refuses a chat template that does not write the tools or the calls of them."""
    for message in messages:
        for key in message.keys() & {"tools", "tool_calls"}:
            missing = [name for name in function_names(message[key]) if name not in text]
            if missing:
                raise DataError(
                    f"{origin}: the chat template of {tokenizer.name_or_path} does not write the {key} of the row, "
                    f"such as {missing[0]!r}: choose one that does (`model.student.chat_template`), or list {key} in "
                    "ignored_keys."
                )


def assistant_spans(
    messages: Sequence[Message], tokenizer: Tokenizer, eos_ids: Ids, origin: str
) -> tuple[str, list[int]]:
    """The rendered conversation up to its last end of turn, and each assistant turn's start and end in it.

    A turn starts where the prompt rendered for it ends: the text after that is what a model would have to generate.
    """
    ends = [decode(tokenizer, [token]) for token in eos_ids]
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    spans = [turn_span(messages, index, tokenizer, ends, origin) for index in turns]
    ends_with_answer = turns[-1] == len(messages) - 1
    full = spans[-1][0] if ends_with_answer else render(messages, tokenizer, False, origin)
    cuts: list[int] = []
    for index, (until, start, end) in zip(turns, spans, strict=True):
        if not full.startswith(until[:end]):
            raise _rewritten(messages, index, tokenizer, origin)
        cuts += [start, end]
    require_written(messages, full, tokenizer, False, origin)
    return full[: cuts[-1]], cuts


def turn_span(
    messages: Sequence[Message], index: int, tokenizer: Tokenizer, ends: Sequence[str], origin: str
) -> tuple[str, int, int]:
    """The conversation rendered up to the assistant's turn `index`, and where that turn starts and ends in it."""
    before = render(messages[:index], tokenizer, True, origin)
    until = render(messages[: index + 1], tokenizer, False, origin)
    turn, reasoning = until[len(before) :], messages[index].get("reasoning_content")
    content = _without_ends(messages[index]["content"], ends)  # one of its own is the end of the turn
    start = 0
    if reasoning:
        if reasoning.strip() not in turn:
            raise DataError(
                f"{origin}: the chat template of {tokenizer.name_or_path} does not write the reasoning of an answer: "
                "choose one that does, or remove the reasoning."
            )
        start = turn.find(reasoning.strip()) + len(reasoning.strip())
    if not until.startswith(before) or not turn.rstrip():
        raise _rewritten(messages, index, tokenizer, origin)
    after = _end_of_content(before if not reasoning else "", turn[start:], content)
    if after is None:
        raise DataError(
            f"{origin}: the chat template of {tokenizer.name_or_path} does not write the whole of assistant turn "
            f"{_turn_number(messages, index)}, as one that leaves out what stands before `</think>`: choose one that "
            "does (`model.student.chat_template`), or change the answer."
        )
    thought = _OPENING.match(content)
    if thought and f"{thought[1]}/{thought[2]}" in turn[: max(0, start + after - len(content))]:
        raise ClosedThoughtError(
            f"{origin}: the chat template of {tokenizer.name_or_path} closes a thought before assistant turn "
            f"{_turn_number(messages, index)}, which begins with one: choose a template that does not "
            "(`model.student.chat_template`), or write the thought as reasoning_content."
        )
    return until, len(before), len(before) + start + _end_of_turn(turn[start:], after, ends)


def template_end(tokenizer: Tokenizer) -> int | None:
    """The token that the chat template writes after an assistant's answer, as the end of its turn.

    Returns:
        Its id; None if there is no template, it refuses a plain conversation, or what follows the answer is not an
        added token, as in templates that name the speakers in words.
    """
    if not tokenizer.chat_template:
        return None
    text = _sample(tokenizer, 2)
    if text is None:
        return None
    if _ANSWER not in text:  # as templates of content in parts, which write nothing of a text
        return None
    after = text.rpartition(_ANSWER)[2].lstrip()
    added = {token: token_id for token, token_id in tokenizer.get_added_vocab().items() if after.startswith(token)}
    return added[max(added, key=len)] if added else None


def unprompted_start(tokenizer: Tokenizer) -> str:
    """The text that the chat template writes before an assistant's answer but not at the end of a prompt.

    Returns:
        Such as `<|im_start|>assistant`, for a template that does not know `add_generation_prompt`; otherwise empty.
    """
    prompt, prompted, answered = (_sample(tokenizer, *arguments) for arguments in ((1,), (1, True), (2,)))
    if prompt is None or prompt != prompted or answered is None or not answered.startswith(prompt):
        return ""
    return answered[len(prompt) :].partition(_ANSWER)[0].strip()


def _sample(tokenizer: Tokenizer, turns: int, generation_prompt: bool = False) -> str | None:
    """A question, and its answer if there are two turns, in the chat template; None if it refuses them."""
    messages = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}][:turns]
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
    except Exception:  # as any program, or ValueError: only templates with names, and none is the default
        return None
    return text


def _rewritten(messages: Sequence[Message], index: int, tokenizer: Tokenizer, origin: str) -> DataError:
    turn_number = _turn_number(messages, index)
    return DataError(
        f"{origin}: the chat template of {tokenizer.name_or_path} renders assistant turn {turn_number} differently "
        "from a model's continuation of its prompt, so it can't be trained on: choose a template that only appends "
        "(`model.student.chat_template`), or cut the conversation to one answer or to its prompt."
    )


def _turn_number(messages: Sequence[Message], index: int) -> int:
    """The number of the assistant's turn `index` among its turns."""
    return sum(message["role"] == "assistant" for message in messages[: index + 1])


def _end_of_content(before: str, turn: str, content: str) -> int | None:
    """Where the content ends in the rendered text of its turn; None if the template does not write the whole of it.

    A template may trim the content, change its whitespace, or open a thought in the prompt with which the content
    begins.
    """
    rendered = content if content in turn else content.strip()
    if rendered in turn:
        return turn.find(rendered) + len(rendered)
    squeezed, opening = "".join(content.split()), "".join(before[-len(content) :].split())
    positions = [position for position, character in enumerate(turn) if not character.isspace()]
    text = opening + "".join(turn[position] for position in positions)
    start = text.find(squeezed, max(0, len(opening) - len(squeezed) + 1))
    return None if start < 0 else positions[start + len(squeezed) - len(opening) - 1] + 1


def _end_of_turn(turn: str, after: int, ends: Sequence[str]) -> int:
    """The end of an assistant's turn in its rendered text: after the first end-of-turn token that follows `after`."""
    spans = [(start, start + len(end)) for end in ends if end and (start := turn.find(end, after)) >= 0]
    return min(spans)[1] if spans else len(turn.rstrip())


def _without_ends(content: str, ends: Sequence[str]) -> str:
    """A content without the end-of-turn tokens at its end, and the whitespace between them."""
    text = content.rstrip()
    end = next((end for end in ends if end.strip() and text.endswith(end)), None)
    return content if end is None else _without_ends(text.removesuffix(end), ends)


def tokenise(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Ids]:
    """The tokens of each text, without added special tokens."""
    # verbose=False: max_length decides on long texts, not the tokenizer's warning about its maximum.
    return [shared(ids) for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]


_TOKENS: dict[int, int] = {}


def shared(ids: Iterable[int]) -> Ids:
    """Token ids as a tuple in which equal ids are one object: 8 bytes a token instead of 36."""
    return tuple([_TOKENS.setdefault(token, token) for token in ids])


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of token ids, special tokens included."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def tokenise_cut(text: str, cuts: Sequence[int], tokenizer: Tokenizer, origin: str) -> tuple[Ids, tuple[int, ...]]:
    """Tokenises `text` so that a token starts at each of the ascending `cuts`, the last one being its end.

    Returns:
        The tokens, and the number of tokens before each cut.
    """
    return completed(cut_steps(text, cuts, tokenizer, origin), tokenizer)


Result = TypeVar("Result")
Steps = Generator[list[str], list[Ids], Result]
"""A computation that yields texts and is sent their tokens, so that many of them can be tokenised at once."""


def completed(steps: Steps[Result], tokenizer: Tokenizer) -> Result:
    """The result of one computation."""
    texts = next(steps)
    while True:
        try:
            texts = steps.send(tokenise(tokenizer, texts))
        except StopIteration as end:
            result: Result = end.value
            return result


def cut_steps(text: str, cuts: Sequence[int], tokenizer: Tokenizer, origin: str) -> Steps[tuple[Ids, tuple[int, ...]]]:
    """`tokenise_cut`, in steps."""
    # Not by offsets: tokenizers that trim them (GPT-NeoX) place a newline before the response inside it.
    if len(cuts) == 2 and cuts[1] == len(text):  # one answer: its text need not be tokenised twice
        prompt, uncut = yield [text[: cuts[0]], text]
        if uncut[: len(prompt)] == prompt:
            return uncut, (len(prompt), len(uncut))
    *pieces, uncut = yield [*(text[start:end] for start, end in pairwise((0, *cuts))), text]
    joined = tuple(token for piece in pieces for token in piece)
    if joined == uncut:
        return uncut, tuple(accumulate(map(len, pieces)))
    # SentencePiece puts a space before each piece, so only prefixes of the text can be compared.
    prefixes = yield [text[:cut] for cut in cuts]
    if all(uncut[: len(prefix)] == prefix for prefix in prefixes):
        return uncut, tuple(map(len, prefixes))
    # A token spans a cut, for example when a response starts with a newline. A model that continues the prompt
    # can't generate such a token: its response starts with a new one.
    if decode(tokenizer, joined) != decode(tokenizer, uncut):
        raise DataError(
            f"{origin}: the tokenizer {tokenizer.name_or_path} joins the end of the prompt and the start of the "
            "response into one token, which no model could generate: move the space between them into the response."
        )
    return joined, tuple(accumulate(map(len, pieces)))
