"""Judging a response by its length."""

from collections.abc import Sequence

from distillkit.errors import ConfigError
from distillkit.interfaces import Verifier
from distillkit.types import Prompts, Response


class TargetLength(Verifier):
    """Minus the number of tokens by which a response is longer or shorter than wanted.

    Args:
        target: Wanted number of tokens, at least 0; 0 prefers the shortest response.

    Raises:
        ConfigError: If `target` is negative.
    """

    def __init__(self, target: int = 0) -> None:
        if target < 0:
            raise ConfigError(f"TargetLength.target must be at least 0, got {target}.")
        self.target = target

    def verify(self, prompts: Prompts, responses: Sequence[Response]) -> list[float]:
        """A number of at most 0 for each response."""
        return [-float(abs(len(response.token_ids) - self.target)) for response in responses]
