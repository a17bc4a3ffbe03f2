"""Response filters: empty, truncated, repetitive and overlong responses."""

from distillkit.data.ngrams import repetition
from distillkit.errors import check_range
from distillkit.interfaces import ResponseFilter
from distillkit.types import Row


class Empty(ResponseFilter):
    """Refuses a response without text: no tokens, white space, or only an end of turn."""

    reason = "empty"

    def refuses(self, row: Row) -> bool:
        """True if the response has no text."""
        return row.blank or not any(row.response_mask)


class Truncated(ResponseFilter):
    """Refuses a generated response that was cut at `max_new_tokens` before its end of turn."""

    reason = "truncated"

    def refuses(self, row: Row) -> bool:
        """True if the response was cut."""
        return not row.ended


class Repeated(ResponseFilter):
    """Refuses a repetitive response: one with a window in which too many n-grams are repeated.

    Args:
        ngram: Tokens per n-gram, at least 1.
        share: Largest accepted fraction of repeated n-grams in a window, in [0, 1).
        window: N-grams per window, at least 1; a shorter response is a single window.

    Raises:
        ConfigError: If a number is outside its range.
    """

    reason = "repeated"

    def __init__(self, ngram: int = 4, share: float = 0.5, window: int = 64) -> None:
        check_range("Repeated.ngram", ngram, 1)
        check_range("Repeated.window", window, 1)
        check_range("Repeated.share", share, 0, 1, closed="left")
        self.ngram, self.share, self.window = ngram, share, window

    def refuses(self, row: Row) -> bool:
        """True if a window has too many repeated n-grams."""
        return repetition(_response(row), self.ngram, self.window) > self.share


class TooLong(ResponseFilter):
    """Refuses a response with too many tokens.

    Args:
        max_tokens: Largest accepted number of tokens, at least 1, end of turn included.

    Raises:
        ConfigError: If `max_tokens` is below 1.
    """

    reason = "too long"

    def __init__(self, max_tokens: int) -> None:
        check_range("TooLong.max_tokens", max_tokens, 1)
        self.max_tokens = max_tokens

    def refuses(self, row: Row) -> bool:
        """True if the response is longer."""
        return sum(row.response_mask) > self.max_tokens


def _response(row: Row) -> list[int]:
    """The response tokens of a row."""
    return [token for token, trained in zip(row.input_ids, row.response_mask, strict=True) if trained]
