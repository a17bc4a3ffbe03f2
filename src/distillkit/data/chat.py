"""Tokenisation of conversations with the model's chat template, and the mask of the assistant's tokens."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from distillkit.data.records import Invalid
from distillkit.data.template_spans import (
    ClosedThoughtError,
    Ids,
    assistant_spans,
    decode,
    render,
    require_written,
    tokenise,
    tokenise_cut,
    turn_span,
    unprompted_start,
)
from distillkit.errors import ConfigError, DataError, ModelError
from distillkit.types import Message, Prompt, Record, Tokenizer

Overlong = Literal["error", "drop"]
Encoded = tuple[Ids, Ids, tuple[bool, ...]]
"""`input_ids`, `reference_ids` and `reference_mask` of a `Prompt`."""


@dataclass(frozen=True)
class EncodeReport:
    """Counts of the records that were encoded and left out.

    Args:
        num_prompts: Number of encoded prompts.
        duplicates: Records left out because an earlier one has the same prompt, each with its origin and that of the
            earlier one; their responses are left out too.
        overlong: Records left out because they are longer than `max_length`, each with its origin and length.
        unended: Encoded responses without an end-of-turn token: the student can't learn to stop from them.
        problems: Errors of the records left out because they can't be encoded.
        inner_ends: Encoded last responses with an end-of-turn token before their end, as a text that quotes one has.
    """

    num_prompts: int
    duplicates: tuple[str, ...]
    overlong: tuple[str, ...]
    unended: int
    problems: tuple[str, ...] = ()
    inner_ends: int = 0

    @property
    def left_out(self) -> tuple[str, ...]:
        """All records left out, each with its origin and the reason."""
        return self.problems + self.overlong + self.duplicates

    def __str__(self) -> str:
        notes = {
            "left out as duplicates": len(self.duplicates),
            "left out as longer than data.max_length": len(self.overlong),
            "left out since they can't be encoded": len(self.problems),
            "responses without an end-of-turn token (the student can't learn to stop from them)": self.unended,
            "responses whose text has an end-of-turn token (the student learns to go on after it)": self.inner_ends,
        }
        return "; ".join(
            [f"{self.num_prompts} prompts", *(f"{count} {note}" for note, count in notes.items() if count)]
        )


def require_chat_template(tokenizer: Tokenizer, chat: bool) -> None:
    """Refuses chat prompts for a tokenizer without a chat template, or with one that does not begin an answer.

    Args:
        tokenizer: A transformers tokenizer.
        chat: Whether prompts go through the template.

    Raises:
        ModelError: If `chat` is True and there is no such template.
    """
    if chat and not tokenizer.chat_template:
        raise ModelError(
            f"The tokenizer {tokenizer.name_or_path} has no chat template: set `data.chat: false` for plain-text "
            "prompts, or give the student a template with `model.student.chat_template`."
        )
    if chat and (start := unprompted_start(tokenizer)):
        raise ModelError(
            f"The chat template of {tokenizer.name_or_path} writes {start!r} before an answer, but not at the end of a "
            "prompt (`add_generation_prompt`): answers would begin with it. Correct the template, or choose another "
            "with `model.student.chat_template`."
        )


def encode_all(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    eos_ids: Ids,
    chat: bool,
    system: str | None,
    max_length: int,
    overlong: Overlong,
    responses: Literal["first", "all"] = "first",
    invalid: Invalid = "error",
) -> tuple[list[Prompt], EncodeReport]:
    """Tokenises records and counts those that it leaves out.

    Args:
        records: The conversations, in their order.
        tokenizer: A transformers tokenizer.
        eos_ids: Token ids that end a turn.
        chat: Whether prompts go through the chat template.
        system: System message for the records that have none; None adds none.
        max_length: Largest number of tokens of a prompt, or of a prompt with its response.
        overlong: Treatment of a longer one: `error` stops, `drop` leaves it out and counts it.
        responses: Records to use of those with the same prompt: the first, or all that differ in their responses.
        invalid: Treatment of a record that can't be encoded: `error` stops, `drop` leaves it out.

    Raises:
        DataError: If a record can't be encoded and `invalid` is `error`, or is too long and `overlong` is `error`.
        ModelError: If the tokenizer lacks the chat template or the end-of-turn token that is needed.
    """
    require_chat_template(tokenizer, chat)
    prompts: dict[str, Prompt] = {}
    problems, duplicates, too_long = list[str](), list[str](), list[str]()
    for record in records:
        try:
            prompt = encode(record, tokenizer, eos_ids, chat, system)
        except DataError as error:
            if invalid == "error":
                raise
            problems.append(str(error))
            continue
        if responses == "all" and prompt.id in prompts and prompt.reference_ids != prompts[prompt.id].reference_ids:
            prompt = replace(prompt, id=_response_id(prompt))
        if _is_overlong(prompt, record, max_length, overlong):
            length = max(len(prompt.input_ids), len(prompt.reference_ids))
            too_long.append(f"{record.origin} has {length} tokens, more than `data.max_length: {max_length}`")
        elif prompt.id in prompts:
            duplicates.append(f"{record.origin} has the same prompt as {prompts[prompt.id].origin}")
        else:
            prompts[prompt.id] = prompt
    references = [prompt.reference_ids for prompt in prompts.values() if prompt.reference_ids]
    unended = sum(ids[-1] not in eos_ids for ids in references)
    ends = frozenset(eos_ids)
    response_ids = [prompt.reference_ids[len(prompt.input_ids) :] for prompt in prompts.values()]
    inner_ends = sum(not ends.isdisjoint(ids[:-1]) for ids in response_ids)
    left_out = tuple(duplicates), tuple(too_long), unended, tuple(problems)
    return list(prompts.values()), EncodeReport(len(prompts), *left_out, inner_ends)


def _response_id(prompt: Prompt) -> str:
    """The id of a further response to a prompt, by the content of both."""
    content = f"{prompt.id} {prompt.reference_ids} {prompt.reference_mask}"
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _is_overlong(prompt: Prompt, record: Record, max_length: int, overlong: Overlong) -> bool:
    length = max(len(prompt.input_ids), len(prompt.reference_ids))
    if length > max_length and overlong == "error":
        raise DataError(
            f"{record.origin} has {length} tokens, more than `data.max_length: {max_length}`: raise it, or set "
            "`data.overlong: drop` to leave such records out."
        )
    return length > max_length


def encode(record: Record, tokenizer: Tokenizer, eos_ids: Ids, chat: bool, system: str | None = None) -> Prompt:
    """Tokenises one record.

    With a template, every assistant turn of the conversation is marked, end of turn included; a last user turn leaves
    nothing to mark and no reference. Without a template, the texts of prompt and response are concatenated.

    Args:
        record: The conversation. If its last turn is an assistant's, the turns before it are the prompt.
        tokenizer: A transformers tokenizer.
        eos_ids: Token ids that end a turn. The first one is appended to a plain-text response.
        chat: Whether the record goes through the tokenizer's chat template.
        system: System message for a record that has none; None adds none.

    Returns:
        The prompt. Its id depends on the prompt's messages alone, not on the response or the tokenizer.

    Raises:
        ConfigError: If `system` is given for plain text.
        DataError: If the template refuses the messages or rewrites turns, or plain text has more than one turn.
        ModelError: If a plain-text response can't be ended because `eos_ids` is empty.
    """
    messages = record.messages
    if system is not None and not chat:
        raise ConfigError("`data.system` needs a chat template, but `data.chat` is false: put it into the prompts.")
    if system is not None and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": system}, *messages)
    answered = messages[-1]["role"] == "assistant"
    prompt = messages[:-1] if answered else messages
    untrained = frozenset(index + len(messages) - len(record.messages) for index in record.untrained)
    input_ids, reference_ids, mask = (
        _encode_chat(messages, untrained, tokenizer, eos_ids, record.origin)
        if chat
        else _encode_plain(messages, tokenizer, eos_ids, record.origin)
    )
    if not record.ended and reference_ids and reference_ids[-1] in eos_ids:
        reference_ids, mask = reference_ids[:-1], mask[:-1]
    reference = messages[-1]["content"] if answered else None
    if "reasoning_content" in messages[-1]:  # as a model would write it
        ids = reference_ids[len(input_ids) :]
        reference = tokenizer.decode(
            list(ids[:-1] if ids and ids[-1] in eos_ids else ids), skip_special_tokens=True
        ).strip()
    return Prompt(prompt_id(prompt), prompt, input_ids, reference_ids, mask, reference, record.origin)


def encode_response(
    prompt: Prompt, text: str, ended: bool, tokenizer: Tokenizer, eos_ids: Ids, reasoning: str = ""
) -> Ids:
    """The tokens of `text` as the response to a prompt: the same as if it had come with the prompt.

    Args:
        prompt: The prompt, from `encode` with the same tokenizer.
        text: The response.
        ended: Whether the turn ends after it: the tokens then include an end of turn.
        tokenizer: A transformers tokenizer.
        eos_ids: Token ids that end a turn. The first one is appended to a plain-text response.
        reasoning: Reasoning before the response. If the response was cut within it, `text` is empty.

    Raises:
        DataError: If the chat template renders the response differently from a model's continuation of the prompt, or
            without its reasoning.
    """
    origin = f"The response to prompt {prompt.id}"
    before, turn = prompt.messages[0]["content"], text
    is_chat = bool(tokenizer.chat_template) and _is_rendered(prompt, tokenizer, origin)
    if is_chat:
        ends = [decode(tokenizer, [token]) for token in eos_ids]
        answer = {"role": "assistant", "content": text} | ({"reasoning_content": reasoning} if reasoning else {})
        try:
            until, start, end = turn_span((*prompt.messages, answer), len(prompt.messages), tokenizer, ends, origin)
        except ClosedThoughtError:
            if ended or reasoning:
                raise
            cut = re.sub(r"\s*[<\[][^>\]]*[>\]]", "", text, count=1)  # cut within its thought
            return encode_response(prompt, "", False, tokenizer, eos_ids, cut)
        before, turn = until[:start], until[start:end]
        if not ended and reasoning and not text:
            turn = turn[: turn.find(reasoning.strip()) + len(reasoning.strip())]
        elif not ended:
            turn = next((turn.removesuffix(close) for close in ends if close and turn.endswith(close)), turn)
    elif reasoning:
        raise DataError(f"{origin} has reasoning, which plain text can't hold: use a model without it.")
    ids: Ids = ()
    if turn:
        joined, bounds = tokenise_cut(before + turn, [len(before), len(before) + len(turn)], tokenizer, origin)
        ids = joined[bounds[0] :]
    return _ended(ids, eos_ids) if ended and not is_chat else ids


def is_plain_text(prompt: Prompt, tokenizer: Tokenizer) -> bool:
    """True if the prompt's tokens are its text, and not its messages in a chat template.

    Args:
        prompt: The prompt, from `encode` with the same tokenizer.
        tokenizer: A transformers tokenizer.
    """
    if len(prompt.messages) != 1:
        return False
    return not tokenizer.chat_template or decode(tokenizer, prompt.input_ids).endswith(prompt.messages[0]["content"])


def _is_rendered(prompt: Prompt, tokenizer: Tokenizer, origin: str) -> bool:
    """True if the prompt's tokens are its messages in the chat template, and not plain text."""
    rendered = tokenise(tokenizer, [render(prompt.messages, tokenizer, True, origin)])[0]
    return rendered == prompt.input_ids or decode(tokenizer, rendered) == decode(tokenizer, prompt.input_ids)


def prompt_id(messages: Sequence[Message]) -> str:
    """First 16 hex digits of the SHA-256 of the messages' canonical JSON."""
    turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    text = json.dumps(turns, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _encode_chat(
    messages: Sequence[Message], untrained: frozenset[int], tokenizer: Tokenizer, eos_ids: Ids, origin: str
) -> Encoded:
    if messages[-1]["role"] == "user":
        prompt = render(messages, tokenizer, True, origin)
        require_written(messages, prompt, tokenizer, True, origin)
        return tokenise(tokenizer, [prompt])[0], (), ()
    text, cuts = assistant_spans(messages, tokenizer, eos_ids, origin)
    reference_ids, bounds = tokenise_cut(text, cuts, tokenizer, origin)
    turns = (index for index, message in enumerate(messages) if message["role"] == "assistant")
    mask = _mask(bounds, [turn not in untrained for turn in turns])
    return reference_ids[: bounds[-2]], reference_ids, mask


def _encode_plain(messages: Sequence[Message], tokenizer: Tokenizer, eos_ids: Ids, origin: str) -> Encoded:
    if [message["role"] for message in messages] not in (["user"], ["user", "assistant"]):
        raise DataError(
            f"{origin} has more than one prompt and one response, which plain text can't hold: set `data.chat: true` "
            "or leave it out."
        )
    if "reasoning_content" in messages[-1]:
        raise DataError(f"{origin} has reasoning, which plain text can't hold: set `data.chat: true` or remove it.")
    prompt = messages[0]["content"]
    first = _first_ids(prompt, tokenizer)
    input_ids = first + tokenise(tokenizer, [prompt])[0]
    if len(messages) == 1:
        return input_ids, (), ()
    if not eos_ids:
        raise ModelError(
            f"The tokenizer {tokenizer.name_or_path} has no end-of-sequence token to end a plain-text response with: "
            "give it one."
        )
    text = prompt + messages[1]["content"]
    ids, bounds = tokenise_cut(text, [len(prompt), len(text)], tokenizer, origin)
    reference_ids = (*first, *_ended(ids, eos_ids))
    return input_ids, reference_ids, _mask((len(first) + bounds[0], len(reference_ids)))


def _ended(ids: Ids, eos_ids: Ids) -> Ids:
    """The tokens of a response with an end of turn, which its text may contain already."""
    return ids if ids and ids[-1] in eos_ids else (*ids, eos_ids[0])


def _first_ids(text: str, tokenizer: Tokenizer) -> Ids:
    """The special tokens that the tokenizer adds before a text, unless the text begins with them.

    Those that it adds after the text are ignored.
    """
    ids, bare = tuple(tokenizer(text, verbose=False)["input_ids"]), tokenise(tokenizer, [text])[0]
    first: Ids = next((ids[:start] for start in range(len(ids)) if ids[start : start + len(bare)] == bare), ())
    return () if bare[: len(first)] == first else first


def _mask(bounds: Sequence[int], trained: Sequence[bool] = (True,)) -> tuple[bool, ...]:
    """True from each even bound up to the following odd one, for the spans that are trained on."""
    mask = [False] * bounds[-1]
    for start, end, is_trained in zip(bounds[::2], bounds[1::2], trained, strict=True):
        mask[start:end] = [is_trained] * (end - start)
    return tuple(mask)
