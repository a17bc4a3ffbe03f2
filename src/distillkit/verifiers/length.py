"""Verifier for the length of a response."""

from collections.abc import Sequence

from distillkit.errors import check_range
from distillkit.interfaces import Verifier
from distillkit.types import Prompts, Response


class TargetLength(Verifier):
    """Negative distance, in tokens, between a response's length and a target length.

    Args:
        target: Preferred number of tokens, at least 0; 0 prefers the shortest response.

    Raises:
        ConfigError: If `target` is negative.
    """

    def __init__(self, target: int = 0) -> None:
        check_range("TargetLength.target", target, 0)
        self.target = target

    def verify(self, prompts: Prompts, responses: Sequence[Response]) -> list[float]:
        """A number of at most 0 for each response."""
        return [-float(abs(len(response.token_ids) - self.target)) for response in responses]
