"""Judging a response by how likely its writer found it."""

from collections.abc import Sequence

from distillkit.errors import DataError
from distillkit.interfaces import Verifier
from distillkit.types import Prompts, Response


class MeanLogProb(Verifier):
    """The mean log-probability of a response's tokens, as its own writer has it at temperature 1, in nats."""

    def verify(self, prompts: Prompts, responses: Sequence[Response]) -> list[float]:
        """A number of at most 0 for each response.

        Raises:
            DataError: If a response has no log-probabilities.
        """
        for response in responses:
            if not response.log_probs:
                raise DataError(
                    f"MeanLogProb needs the writer's log-probabilities, and the response to prompt "
                    f"{response.prompt_id} has none: use a generator that gives them, or another verifier."
                )
        return [sum(response.log_probs) / len(response.log_probs) for response in responses]
