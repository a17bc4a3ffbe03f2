"""Admission of responses to a store: only those are written that every later run can read."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distillkit.storage.shards import LARGEST_LOG_PROB
from distillkit.types import Prompt, Response

LARGEST_TOKEN_ID = 2**31 - 1


def fault(response: Response, prompt: Prompt | None = None) -> str:
    """The reason for which a response can't be stored; an empty string if it can be.

    A generator may hand on what a server or a file says, whatever the annotations of `Response` promise: so types are
    checked, and each number.

    Args:
        response: The response.
        prompt: The prompt that it answers, if its messages are to be stored with it.
    """
    token_ids = _numbers(response.token_ids, (int, np.integer))
    if token_ids is None:
        return f"its token ids are not all integers ({_excerpt(response.token_ids)})"
    if len(token_ids) and not (token_ids.min() >= 0 and token_ids.max() <= LARGEST_TOKEN_ID):
        return f"its token ids are not all in [0, {LARGEST_TOKEN_ID}] ({_excerpt(response.token_ids)})"
    texts: list[object] = [response.prompt_id, response.text]
    if prompt is not None:
        texts += [message.get(name) for message in prompt.messages for name in ("role", "content")]
    if not all(map(_is_text, texts)):
        return "its text or its prompt's is not valid Unicode, such as half of a surrogate pair"
    if response.pending or response.finish not in ("stop", "length"):
        return f"it ended neither by stop nor by length ({_excerpt(response.finish)})"
    return _log_prob_fault(response, len(token_ids))


def _log_prob_fault(response: Response, length: int) -> str:
    log_probs = _numbers(response.log_probs, (int, float, np.integer, np.floating))
    if log_probs is None:
        return f"its log-probabilities are not all numbers ({_excerpt(response.log_probs)})"
    if len(log_probs) not in (0, length):
        return f"it has {len(log_probs)} log-probabilities and {length} tokens"
    with np.errstate(over="ignore"):  # of numbers that float32, as which they are stored, doesn't have
        is_finite = bool(np.isfinite(log_probs.astype(np.float32)).all())
    if not is_finite or (len(log_probs) and log_probs.max() > LARGEST_LOG_PROB):
        return f"its log-probabilities are not all finite and at most 0 ({_excerpt(response.log_probs)})"
    return ""


def _numbers(values: Any, types: tuple[type, ...]) -> NDArray[Any] | None:
    """The values as an array; None if they are no sequence of numbers of these types. A bool is no number."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        return None
    if not all(issubclass(kind, types) and kind is not bool for kind in set(map(type, values))):
        return None
    try:
        return np.array(values, np.float64 if float in types else np.int64)
    except OverflowError:
        return None


def _is_text(text: object) -> bool:
    """Returns True if `text` is a string that UTF-8 can encode."""
    try:
        return isinstance(text, str) and text.encode() is not None
    except UnicodeEncodeError:
        return False


def _excerpt(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
