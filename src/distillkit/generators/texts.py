"""Text of responses: decoded from generated tokens, or converted to the run's tokens."""

from collections.abc import Sequence

from distillkit.data.chat import encode_response
from distillkit.types import Prompt, Response, Tokenizer


def decoded(tokenizer: Tokenizer, token_ids: Sequence[int], eos_ids: Sequence[int]) -> str:
    """The text of generated tokens, without special tokens and without the end of the turn.

    A base model's tokenizer may have the end of turn as a plain added token, which `skip_special_tokens` leaves in.

    Args:
        tokenizer: The run's tokenizer.
        token_ids: Token ids of a response.
        eos_ids: Token ids that end a turn.
    """
    ids = list(token_ids[:-1] if token_ids and token_ids[-1] in eos_ids else token_ids)
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


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
    ids = encode_response(prompt, text, ended, tokenizer, eos_ids, reasoning)
    is_cut = len(ids) > limit
    if is_cut:
        ids, ended = ids[:limit], False
    if is_cut or reasoning:
        text = decoded(tokenizer, ids, eos_ids)
    return Response(prompt.id, ids, text.strip(), "stop" if ended else "length")
