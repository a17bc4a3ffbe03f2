"""Verifier for the likelihood of a response under the model that generated it."""

from collections.abc import Sequence

from distillkit.errors import DataError
from distillkit.interfaces import Verifier
from distillkit.types import Prompts, Response


class MeanLogProb(Verifier):
    """Mean log-probability of a response's tokens under the model that generated it, at temperature 1, in nats."""

    def verify(self, prompts: Prompts, responses: Sequence[Response]) -> list[float]:
        """A number of at most 0 for each response.

        Raises:
            DataError: If a response has no log-probabilities.
        """
        for response in responses:
            if not response.log_probs:
                raise DataError(
                    f"MeanLogProb needs the log-probabilities of the generated tokens, and the response to prompt "
                    f"{response.prompt_id} has none: use a generator that reports them, or another verifier."
                )
        return [sum(response.log_probs) / len(response.log_probs) for response in responses]
