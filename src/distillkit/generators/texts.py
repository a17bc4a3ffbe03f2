"""Texts that something outside this process wrote -> responses in the run's own tokens."""

from typing import Any

from distillkit.data.chat import encode_response
from distillkit.types import Prompt, Response


def as_response(
    prompt: Prompt, text: str, ended: bool, tokenizer: Any, eos_ids: tuple[int, ...], limit: int
) -> Response:
    """The response that `text` is, in the tokens that it would have had if it had come with the prompt.

    Args:
        prompt: The prompt that it answers.
        text: What was written.
        ended: Whether the turn ended there.
        tokenizer: The run's tokenizer.
        eos_ids: Token ids that end a turn.
        limit: Longest response in tokens. Another tokenizer may have needed fewer: what is too long is cut.

    Raises:
        DataError: If the chat template can't hold the answer.
    """
    ids = encode_response(prompt, text, ended, tokenizer, eos_ids)
    if len(ids) > limit:
        ids, ended = ids[:limit], False
        text = tokenizer.decode(list(ids), skip_special_tokens=True)
    return Response(prompt.id, ids, text.strip(), "stop" if ended else "length")
