"""Tokenisation of conversations with the model's chat template, and the mask of the assistant's tokens."""

import hashlib
import json
import re
from collections.abc import Sequence

from distillkit.data.template_spans import (
    ClosedThoughtError,
    Ids,
    Steps,
    assistant_spans,
    completed,
    cut_steps,
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

_TOOL_KEYS = ("tools", "tool_calls", "name", "tool_call_id")
"""Keys of messages with tools that are part of a prompt."""

Encoded = tuple[Ids, Ids, tuple[bool, ...]]
"""`input_ids`, `reference_ids` and `reference_mask` of a `Prompt`."""


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
    return completed(encode_steps(record, tokenizer, eos_ids, chat, system), tokenizer)


def encode_steps(
    record: Record, tokenizer: Tokenizer, eos_ids: Ids, chat: bool, system: str | None = None
) -> Steps[Prompt]:
    """`encode`, in steps of texts to be tokenised."""
    if system is not None and not chat:
        raise ConfigError("`data.system` needs a chat template, but `data.chat` is false: put it into the prompts.")
    messages = record.messages if system is None else _with_system(record.messages, system)
    answered = messages[-1]["role"] == "assistant"
    prompt = messages[:-1] if answered else messages
    untrained = frozenset(index + len(messages) - len(record.messages) for index in record.untrained)
    encode_messages = _encode_chat if chat else _encode_plain
    input_ids, reference_ids, mask = yield from encode_messages(messages, untrained, tokenizer, eos_ids, record.origin)
    rejected_ids: Ids = ()
    if record.rejected is not None:
        pair = (*prompt, record.rejected)
        _, rejected_ids, _ = yield from encode_messages(pair, untrained, tokenizer, eos_ids, record.origin)
    if not record.ended and reference_ids and reference_ids[-1] in eos_ids:
        reference_ids, mask = reference_ids[:-1], mask[:-1]
    reference = messages[-1]["content"] if answered else None
    if answered and messages[-1].keys() & {"reasoning_content", "tool_calls"}:  # as a model would write it
        ids = reference_ids[len(input_ids) :]
        reference = tokenizer.decode(
            list(ids[:-1] if ids and ids[-1] in eos_ids else ids), skip_special_tokens=True
        ).strip()
    return Prompt(prompt_id(prompt), prompt, input_ids, reference_ids, mask, reference, record.origin, rejected_ids)


def _with_system(messages: tuple[Message, ...], system: str) -> tuple[Message, ...]:
    """The messages after a system message, unless they have one; the tools are the first message's."""
    if messages[0]["role"] == "system":
        return messages
    tools = {key: value for key, value in messages[0].items() if key == "tools"}
    first = {key: value for key, value in messages[0].items() if key != "tools"}
    return ({"role": "system", "content": system, **tools}, first, *messages[1:])


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
    turns = [{key: message[key] for key in ("role", "content", *_TOOL_KEYS) if key in message} for message in messages]
    text = json.dumps(turns, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _encode_chat(
    messages: Sequence[Message], untrained: frozenset[int], tokenizer: Tokenizer, eos_ids: Ids, origin: str
) -> Steps[Encoded]:
    if messages[-1]["role"] != "assistant":
        prompt = render(messages, tokenizer, True, origin)
        require_written(messages, prompt, tokenizer, True, origin)
        [input_ids] = yield [prompt]
        return input_ids, (), ()
    text, cuts = assistant_spans(messages, tokenizer, eos_ids, origin)
    reference_ids, bounds = yield from cut_steps(text, cuts, tokenizer, origin)
    turns = (index for index, message in enumerate(messages) if message["role"] == "assistant")
    mask = _mask(bounds, [turn not in untrained for turn in turns])
    return reference_ids[: bounds[-2]], reference_ids, mask


def _encode_plain(
    messages: Sequence[Message], untrained: frozenset[int], tokenizer: Tokenizer, eos_ids: Ids, origin: str
) -> Steps[Encoded]:
    if [message["role"] for message in messages] not in (["user"], ["user", "assistant"]):
        raise DataError(
            f"{origin} has more than one prompt and one response, which plain text can't hold: set `data.chat: true` "
            "or leave it out."
        )
    for key, noun in (("reasoning_content", "reasoning"), ("tool_calls", "tool calls"), ("tools", "tools")):
        if any(key in message for message in messages):
            raise DataError(f"{origin} has {noun}, which plain text can't hold: set `data.chat: true` or remove it.")
    prompt = messages[0]["content"]
    first = _first_ids(prompt, tokenizer)
    [bare] = yield [prompt]
    input_ids = first + bare
    if len(messages) == 1:
        return input_ids, (), ()
    if not eos_ids:
        raise ModelError(
            f"The tokenizer {tokenizer.name_or_path} has no end-of-sequence token to end a plain-text response with: "
            "give it one."
        )
    text = prompt + messages[1]["content"]
    ids, bounds = yield from cut_steps(text, [len(prompt), len(text)], tokenizer, origin)
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
