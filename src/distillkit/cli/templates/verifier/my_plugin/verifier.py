"""A verifier: scores each response against the reference."""

from collections.abc import Sequence

from distillkit.data import words
from distillkit.errors import ConfigError
from distillkit.interfaces import Verifier
from distillkit.types import Prompts, Response


class MyPlugin(Verifier):
    """The fraction of the reference's words that the response contains, ignoring case and order.

    Args:
        shortest: Minimum number of letters of a word that counts, at least 1.

    Raises:
        ConfigError: If `shortest` is below 1.
    """

    needs_reference = True  # datasets without reference responses are refused before any model is loaded

    def __init__(self, shortest: int = 4) -> None:
        if shortest < 1:
            raise ConfigError(f"MyPlugin.shortest must be at least 1 letter, got {shortest}.")
        self.shortest = shortest

    def verify(self, prompts: Prompts, responses: Sequence[Response]) -> list[float]:
        """Returns a score in [0, 1] for each response, larger is better; 1 if the reference has no words that count."""
        scores = []
        for prompt, response in zip(prompts, responses, strict=True):
            reference_words = self._words(prompt.reference or "")
            matches = reference_words & self._words(response.text)
            scores.append(len(matches) / len(reference_words) if reference_words else 1.0)
        return scores

    def _words(self, text: str) -> set[str]:
        return {word for word in words(text) if len(word) >= self.shortest}
