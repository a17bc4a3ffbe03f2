"""Conversations -> tokens, through the model's own chat template, and which of the tokens an assistant wrote.

The marks come from where the text stands, never from token ids: they are right when padding and end of turn are the
same token, when the template trims what it is given, and when a user quotes a special token.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal

from jinja2 import TemplateError

from distillkit.data.records import Record
from distillkit.errors import ConfigError, DataError, ModelError
from distillkit.types import Message, Prompt

Ids = tuple[int, ...]
Overlong = Literal["error", "drop"]
Encoded = tuple[Ids, Ids, tuple[bool, ...]]
"""What `Prompt` calls `input_ids`, `reference_ids` and `reference_mask`."""


@dataclass(frozen=True)
class EncodeReport:
    """What became of the records.

    Args:
        kept: Number of prompts.
        duplicates: Records left out since an earlier one has the same prompt; their responses are left out too.
        overlong: Records left out since they are longer than `max_length`.
        unended: Kept responses that end without an end-of-turn token: nobody learns from them when to stop.
    """

    kept: int
    duplicates: int
    overlong: int
    unended: int

    def __str__(self) -> str:
        notes = {
            "left out as duplicates": self.duplicates,
            "left out as longer than data.max_length": self.overlong,
            "responses without an end of turn, from which nobody learns to stop": self.unended,
        }
        return "; ".join([f"{self.kept} prompts", *(f"{count} {what}" for what, count in notes.items() if count)])


def require_chat_template(tokenizer: Any, chat: bool) -> None:
    """Refuses chat prompts for a tokenizer without a chat template.

    Args:
        tokenizer: A transformers tokenizer.
        chat: Whether prompts go through the template.

    Raises:
        ModelError: If they do and there is none.
    """
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            f"The tokenizer {tokenizer.name_or_path} has no chat template: set `data.chat: false` for plain-text "
            "prompts, or give the model a template."
        )


def encode_all(
    records: Iterable[Record],
    tokenizer: Any,
    eos_ids: Ids,
    chat: bool,
    system: str | None,
    max_length: int,
    overlong: Overlong,
) -> tuple[list[Prompt], EncodeReport]:
    """Tokenises records, keeps the first of those with the same prompt, and counts what it leaves out.

    Args:
        records: The conversations, in their order.
        tokenizer: A transformers tokenizer.
        eos_ids: Token ids that end a turn.
        chat: Whether prompts go through the chat template.
        system: System message for the records that have none; None adds none.
        max_length: Largest number of tokens of a prompt, or of a prompt with its response.
        overlong: What to do with a longer one: `error` stops, `drop` leaves it out and counts it.

    Raises:
        DataError: If a record can't be encoded, or is too long and `overlong` is `error`.
        ModelError: If the tokenizer lacks the chat template or the end-of-turn token that is needed.
    """
    require_chat_template(tokenizer, chat)
    prompts: dict[str, Prompt] = {}
    duplicates = dropped = 0
    for record in records:
        prompt = encode(record, tokenizer, eos_ids, chat, system)
        if _is_overlong(prompt, record, max_length, overlong):
            dropped += 1
        elif prompt.id in prompts:
            duplicates += 1
        else:
            prompts[prompt.id] = prompt
    unended = sum(bool(one.reference_ids) and one.reference_ids[-1] not in eos_ids for one in prompts.values())
    return list(prompts.values()), EncodeReport(len(prompts), duplicates, dropped, unended)


def _is_overlong(prompt: Prompt, record: Record, max_length: int, overlong: Overlong) -> bool:
    length = max(len(prompt.input_ids), len(prompt.reference_ids))
    if length > max_length and overlong == "error":
        raise DataError(
            f"{record.origin} has {length} tokens, more than `data.max_length: {max_length}`: raise it, or set "
            "`data.overlong: drop` to leave such records out."
        )
    return length > max_length


def encode(record: Record, tokenizer: Any, eos_ids: Ids, chat: bool, system: str | None = None) -> Prompt:
    """Tokenises one record.

    With a template, every assistant turn of the conversation is marked, end of turn included; a last user turn leaves
    nothing to mark and no reference. Without one, prompt and response are joined as they are.

    Args:
        record: The conversation. If its last turn is an assistant's, the prompt is what comes before.
        tokenizer: A transformers tokenizer.
        eos_ids: Token ids that end a turn. The first one is written after a plain-text response.
        chat: Whether the record goes through the tokenizer's chat template.
        system: System message for a record that has none; None adds none.

    Returns:
        The prompt. Its id depends on the prompt's messages alone, not on the response or the tokenizer.

    Raises:
        ConfigError: If `system` is given for plain text.
        DataError: If the template refuses the messages or rewrites turns, or plain text has more than one turn.
        ModelError: If a plain-text response can't be ended for want of `eos_ids`.
    """
    messages = record.messages
    if system is not None and not chat:
        raise ConfigError("`data.system` needs a chat template, but `data.chat` is false: write it into the prompts.")
    if system is not None and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": system}, *messages)
    answered = messages[-1]["role"] == "assistant"
    prompt = messages[:-1] if answered else messages
    encoded = (_encode_chat if chat else _encode_plain)(messages, tokenizer, eos_ids, record.origin)
    return Prompt(prompt_id(prompt), prompt, *encoded, reference=messages[-1]["content"] if answered else None)


def encode_response(prompt: Prompt, text: str, ended: bool, tokenizer: Any, eos_ids: Ids) -> Ids:
    """The tokens that follow the prompt's where `text` answers it: as if it had come with the prompt.

    Args:
        prompt: The prompt, from `encode` with the same tokenizer.
        text: What was answered.
        ended: Whether the turn ended there: an end of turn is then part of the tokens.
        tokenizer: A transformers tokenizer.
        eos_ids: Token ids that end a turn. The first one is written after a plain-text response.

    Raises:
        DataError: If the chat template writes the answer differently from what a model would continue the prompt with.
    """
    origin = f"The response to prompt {prompt.id}"
    before, turn = prompt.messages[0]["content"], text
    is_chat = bool(getattr(tokenizer, "chat_template", None)) and _is_rendered(prompt, tokenizer, origin)
    if is_chat:
        ends = [_decode(tokenizer, [token]) for token in eos_ids]
        answered = (*prompt.messages, {"role": "assistant", "content": text})
        until, start, end = _turn(answered, len(prompt.messages), tokenizer, ends, origin)
        before, turn = until[:start], until[start:end]
        if not ended:
            turn = next((turn.removesuffix(close) for close in ends if close and turn.endswith(close)), turn)
    ids: Ids = ()
    if turn:
        joined, bounds = _tokenise_cut(before + turn, [len(before), len(before) + len(turn)], tokenizer, origin)
        ids = joined[bounds[0] :]
    return (*ids, eos_ids[0]) if ended and not is_chat else ids


def _is_rendered(prompt: Prompt, tokenizer: Any, origin: str) -> bool:
    """Whether the prompt's tokens are those of its messages in the chat template, and not of plain text."""
    rendered = _tokenise(tokenizer, [_render(prompt.messages, tokenizer, True, origin)])[0]
    return rendered == prompt.input_ids or _decode(tokenizer, rendered) == _decode(tokenizer, prompt.input_ids)


def prompt_id(messages: Sequence[Message]) -> str:
    """First 16 hex digits of the SHA-256 of the messages' canonical JSON."""
    turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    text = json.dumps(turns, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _encode_chat(messages: Sequence[Message], tokenizer: Any, eos_ids: Ids, origin: str) -> Encoded:
    if messages[-1]["role"] == "user":
        return _tokenise(tokenizer, [_render(messages, tokenizer, True, origin)])[0], (), ()
    text, cuts = _spans(messages, tokenizer, eos_ids, origin)
    reference_ids, bounds = _tokenise_cut(text, cuts, tokenizer, origin)
    return reference_ids[: bounds[-2]], reference_ids, _mask(bounds)


def _encode_plain(messages: Sequence[Message], tokenizer: Any, eos_ids: Ids, origin: str) -> Encoded:
    if [message["role"] for message in messages] not in (["user"], ["user", "assistant"]):
        raise DataError(
            f"{origin} has more than one prompt and one response, which plain text can't hold: set `data.chat: true` "
            "or leave it out."
        )
    prompt = messages[0]["content"]
    first = _first_ids(prompt, tokenizer)
    input_ids = first + _tokenise(tokenizer, [prompt])[0]
    if len(messages) == 1:
        return input_ids, (), ()
    if not eos_ids:
        raise ModelError(
            f"The tokenizer {tokenizer.name_or_path} has no end-of-sequence token to end a plain-text response with: "
            "give it one."
        )
    text = prompt + messages[1]["content"]
    ids, bounds = _tokenise_cut(text, [len(prompt), len(text)], tokenizer, origin)
    written = len(first) + bounds[0], len(first) + bounds[1] + 1
    return input_ids, (*first, *ids, eos_ids[0]), _mask(written)


def _first_ids(text: str, tokenizer: Any) -> Ids:
    """The special tokens that the tokenizer puts before a text by itself. Those that it puts behind are not wanted."""
    ids, bare = tuple(tokenizer(text, verbose=False)["input_ids"]), _tokenise(tokenizer, [text])[0]
    return next((ids[:start] for start in range(len(ids)) if ids[start : start + len(bare)] == bare), ())


def _mask(bounds: Sequence[int]) -> tuple[bool, ...]:
    """True from each even bound up to the odd one behind it; as long as the last bound."""
    mask = [False] * bounds[-1]
    for start, end in zip(bounds[::2], bounds[1::2], strict=True):
        mask[start:end] = [True] * (end - start)
    return tuple(mask)


def _render(messages: Sequence[Message], tokenizer: Any, generation_prompt: bool, origin: str) -> str:
    try:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=generation_prompt
        )
    except TemplateError as error:
        raise DataError(
            f"{origin} is refused by the chat template of {tokenizer.name_or_path} ({error}): change the messages or "
            "the template."
        ) from error
    return text


def _spans(messages: Sequence[Message], tokenizer: Any, eos_ids: Ids, origin: str) -> tuple[str, list[int]]:
    """The rendered conversation up to its last end of turn, and each assistant turn's start and end in it.

    A turn starts where the prompt rendered for it stops: what follows is what a model would have had to write.
    """
    full = _render(messages, tokenizer, False, origin)
    ends = [_decode(tokenizer, [token]) for token in eos_ids]
    cuts: list[int] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        until, start, end = _turn(messages, index, tokenizer, ends, origin)
        if not full.startswith(until[:end]):
            raise _rewritten(messages, index, tokenizer, origin)
        cuts += [start, end]
    return full[: cuts[-1]], cuts


def _turn(
    messages: Sequence[Message], index: int, tokenizer: Any, ends: Sequence[str], origin: str
) -> tuple[str, int, int]:
    """The conversation rendered up to the assistant's turn `index`, and where that turn starts and ends in it."""
    before = _render(messages[:index], tokenizer, True, origin)
    until = _render(messages[: index + 1], tokenizer, False, origin)
    end = len(before) + _end_of_turn(until[len(before) :], messages[index]["content"], ends)
    if not until.startswith(before) or end == len(before):
        raise _rewritten(messages, index, tokenizer, origin)
    return until, len(before), end


def _rewritten(messages: Sequence[Message], index: int, tokenizer: Any, origin: str) -> DataError:
    number = sum(message["role"] == "assistant" for message in messages[: index + 1])
    return DataError(
        f"{origin}: the chat template of {tokenizer.name_or_path} writes assistant turn {number} differently from what "
        "a model would continue its prompt with, so that it can't be trained on: choose a template that only appends, "
        "or cut the conversation to one answer or to its prompt."
    )


def _end_of_turn(turn: str, content: str, ends: Sequence[str]) -> int:
    """Where an assistant's turn ends in its rendered text: behind the first end-of-turn token after the content.

    A content that the template trimmed or rewrote is looked for without its outer whitespace, then not at all.
    """
    written = content if content in turn else content.strip()
    after = turn.find(written) + len(written) if written in turn else 0
    found = [(at, at + len(end)) for end in ends if end and (at := turn.find(end, after)) >= 0]
    return min(found)[1] if found else len(turn.rstrip())


def _tokenise(tokenizer: Any, texts: Sequence[str]) -> list[Ids]:
    # verbose=False: a text beyond the tokenizer's own maximum is judged by max_length, not by a warning.
    return [tuple(ids) for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _tokenise_cut(text: str, cuts: Sequence[int], tokenizer: Any, origin: str) -> tuple[Ids, tuple[int, ...]]:
    """Tokenises `text` so that a token starts at each of the ascending `cuts`, the last one being its end.

    Returns:
        The tokens, and the number of tokens before each cut.
    """
    # Not by offsets: tokenizers that trim them (GPT-NeoX) place a newline before the response inside it.
    *pieces, whole = _tokenise(tokenizer, [*(text[start:end] for start, end in pairwise((0, *cuts))), text])
    joined = tuple(token for piece in pieces for token in piece)
    if joined == whole:
        return whole, tuple(accumulate(map(len, pieces)))
    # SentencePiece writes a space before each piece, so that only what starts at the beginning can be compared.
    prefixes = _tokenise(tokenizer, [text[:cut] for cut in cuts])
    if all(whole[: len(prefix)] == prefix for prefix in prefixes):
        return whole, tuple(map(len, prefixes))
    # A token reaches across a cut, as where a response starts with a newline. A model that continues the prompt
    # can't write such a token: it starts with one of its own.
    if _decode(tokenizer, joined) != _decode(tokenizer, whole):
        raise DataError(
            f"{origin}: the tokenizer {tokenizer.name_or_path} joins the end of the prompt and the start of the "
            "response into one token, so that no model could write it: move the space between them into the response."
        )
    return joined, tuple(accumulate(map(len, pieces)))
