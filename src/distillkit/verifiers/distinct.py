"""Verifier for repetition: the share of distinct n-grams in a response."""

from collections.abc import Sequence

from distillkit.errors import check_range
from distillkit.interfaces import Verifier
from distillkit.types import Prompts, Response


class Distinct(Verifier):
    """Number of distinct token n-grams over the number of all n-grams of a response (distinct-n, Li et al. 2016).

    1 for a response without repetition, and for one of fewer than n tokens; near 0 for a response that loops.

    Args:
        n: Length of the n-grams in tokens, at least 1.

    Raises:
        ConfigError: If `n` is below 1.
    """

    def __init__(self, n: int = 2) -> None:
        check_range("Distinct.n", n, 1)
        self.n = n

    def verify(self, prompts: Prompts, responses: Sequence[Response]) -> list[float]:
        """A number in (0, 1] for each response."""
        return [self._distinct_share(response.token_ids) for response in responses]

    def _distinct_share(self, token_ids: Sequence[int]) -> float:
        n_grams = [tuple(token_ids[start : start + self.n]) for start in range(len(token_ids) - self.n + 1)]
        return len(set(n_grams)) / len(n_grams) if n_grams else 1.0
