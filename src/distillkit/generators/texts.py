"""Text of responses: decoded from generated tokens, or converted to the run's tokens."""

from collections.abc import Sequence

from distillkit.data.chat import encode_response, is_plain_text
from distillkit.data.template_spans import decode
from distillkit.types import Prompt, Response, Tokenizer


def decoded(
    tokenizer: Tokenizer, token_ids: Sequence[int], eos_ids: Sequence[int], prompt: Prompt | None = None
) -> str:
    """The text of generated tokens, without special tokens and without the end of the turn.

    A base model's tokenizer may have the end of turn as a plain added token, which `skip_special_tokens` leaves in.
    Of a response that was cut within a character, the part of that character is left out.

    Args:
        tokenizer: The run's tokenizer.
        token_ids: Token ids of a response.
        eos_ids: Token ids that end a turn.
        prompt: The prompt that the tokens continue. If it is plain text, so is the result: prompt and result joined are
            the whole text, and a space between them belongs to the result. Otherwise, and if None, outer whitespace is
            left out.
    """
    ended = bool(token_ids) and token_ids[-1] in eos_ids
    ids = list(token_ids[:-1] if ended else token_ids)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    is_plain = prompt is not None and is_plain_text(prompt, tokenizer)
    if prompt is not None and is_plain:  # SentencePiece leaves out the space before the first word of what it decodes
        before = tokenizer.decode(list(prompt.input_ids), skip_special_tokens=True)
        whole = tokenizer.decode([*prompt.input_ids, *ids], skip_special_tokens=True)
        text = whole[len(before) :] if whole.startswith(before) else text
    if not ended:
        text = text.rstrip(_PART_OF_CHARACTER)
    return text if is_plain else text.strip()


_PART_OF_CHARACTER = "\N{REPLACEMENT CHARACTER}"
"""The character that tokenizers decode an incomplete character to."""


def as_response(
    prompt: Prompt,
    text: str,
    ended: bool,
    tokenizer: Tokenizer,
    eos_ids: tuple[int, ...],
    limit: int,
    reasoning: str = "",
) -> Response:
    """Converts text to a response, with the tokens it would have had if it had come with the prompt in the data.

    Args:
        prompt: The prompt that the text answers.
        text: The generated text.
        ended: Whether the turn ended after the text.
        tokenizer: The run's tokenizer.
        eos_ids: Token ids that end a turn.
        limit: Longest response in tokens. The text may need more tokens here than in the tokenizer of the model that
            generated it: what exceeds the limit is cut.
        reasoning: Reasoning before the text, as a server or a file reports it separately. It becomes part of the
            response's text, as the chat template writes it.

    Raises:
        DataError: If the chat template can't represent the answer or its reasoning.
    """
    text = text if ended else text.rstrip(_PART_OF_CHARACTER)
    ids = encode_response(prompt, text, ended, tokenizer, eos_ids, reasoning)
    is_cut = len(ids) > limit
    if is_cut:
        ids, ended = ids[:limit], False
    has_end = any(text.rstrip().endswith(decode(tokenizer, [token])) for token in eos_ids)
    if is_cut or reasoning or has_end:
        text = decoded(tokenizer, ids, eos_ids, prompt)
    text = text if is_plain_text(prompt, tokenizer) else text.strip()
    return Response(prompt.id, ids, text, "stop" if ended else "length")
