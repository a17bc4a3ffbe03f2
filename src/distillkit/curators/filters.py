"""Filters: why a response is not trained on."""

from abc import ABC, abstractmethod

from distillkit.data.ngrams import repetition
from distillkit.errors import ConfigError
from distillkit.types import Row


class ResponseFilter(ABC):
    """Refuses responses."""

    reason: str
    """What the log says of a refused response, such as `empty`."""

    @abstractmethod
    def refuses(self, row: Row) -> bool:
        """Whether the row's response is not to be trained on."""


class Empty(ResponseFilter):
    """Refuses a response without text: none at all, white space, or nothing but the end of turn."""

    reason = "empty"

    def refuses(self, row: Row) -> bool:
        """Whether nothing was said."""
        return row.blank or not any(row.response_mask)


class Truncated(ResponseFilter):
    """Refuses a model's response that was cut at the largest number of new tokens before its turn ended."""

    reason = "truncated"

    def refuses(self, row: Row) -> bool:
        """Whether it was cut."""
        return not row.ended


class Repeated(ResponseFilter):
    """Refuses a response that goes round in circles: one with a stretch in which too many n-grams come again.

    Args:
        ngram: Tokens of an n-gram, at least 1.
        share: Largest share of repeated n-grams in a stretch that is let through, in [0, 1).
        window: N-grams of a stretch, at least 1; a shorter response is one stretch.

    Raises:
        ConfigError: If a number is outside its range.
    """

    reason = "repeated"

    def __init__(self, ngram: int = 4, share: float = 0.5, window: int = 64) -> None:
        if ngram < 1 or window < 1:
            raise ConfigError(f"Repeated.ngram and .window must be at least 1, got {ngram} and {window}.")
        if not 0 <= share < 1:
            raise ConfigError(f"Repeated.share must lie in [0, 1), got {share}.")
        self.ngram, self.share, self.window = ngram, share, window

    def refuses(self, row: Row) -> bool:
        """Whether a stretch repeats itself too much."""
        return repetition(_response(row), self.ngram, self.window) > self.share


class TooLong(ResponseFilter):
    """Refuses a response of more tokens than are wanted.

    Args:
        max_tokens: Largest number of tokens that is let through, at least 1, end of turn included.

    Raises:
        ConfigError: If `max_tokens` is below 1.
    """

    reason = "too long"

    def __init__(self, max_tokens: int) -> None:
        if max_tokens < 1:
            raise ConfigError(f"TooLong.max_tokens must be at least 1, got {max_tokens}.")
        self.max_tokens = max_tokens

    def refuses(self, row: Row) -> bool:
        """Whether it is longer."""
        return sum(row.response_mask) > self.max_tokens


def _response(row: Row) -> list[int]:
    """The tokens that would be trained on."""
    return [token for token, used in zip(row.input_ids, row.response_mask, strict=True) if used]
