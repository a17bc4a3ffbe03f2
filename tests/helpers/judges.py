"""Verifiers for tests."""

from collections.abc import Sequence

from distillkit.interfaces import Verifier
from distillkit.types import Prompts, Response


class Even(Verifier):
    """1 for a response whose tokens have an even sum, else 0."""

    def verify(self, prompts: Prompts, responses: Sequence[Response]) -> list[float]:
        return [float(sum(response.token_ids) % 2 == 0) for response in responses]
