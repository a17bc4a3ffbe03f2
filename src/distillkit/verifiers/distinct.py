"""Judging a response by how much of it is new."""

from collections.abc import Sequence

from distillkit.errors import ConfigError
from distillkit.interfaces import Verifier
from distillkit.types import Prompts, Response


class Distinct(Verifier):
    """Share of a response's n-grams of tokens that are no repetition of an earlier one (Li et al. 2016, distinct-n).

    1 for a response without repetition, and for one of fewer than n tokens; near 0 for a loop.

    Args:
        n: Tokens of an n-gram, at least 1.

    Raises:
        ConfigError: If `n` is below 1.
    """

    def __init__(self, n: int = 2) -> None:
        if n < 1:
            raise ConfigError(f"Distinct.n must be at least 1, got {n}.")
        self.n = n

    def verify(self, prompts: Prompts, responses: Sequence[Response]) -> list[float]:
        """A number in (0, 1] for each response."""
        return [self._share(response.token_ids) for response in responses]

    def _share(self, tokens: Sequence[int]) -> float:
        grams = [tuple(tokens[start : start + self.n]) for start in range(len(tokens) - self.n + 1)]
        return len(set(grams)) / len(grams) if grams else 1.0
