"""A number for each response."""

from collections.abc import Sequence

from distillkit.errors import ConfigError
from distillkit.interfaces import Verifier
from distillkit.types import Prompts, Response


class MyPlugin(Verifier):
    """Share of the words of the data's response that the response has too, whatever their case and order.

    Args:
        shortest: Letters of the shortest word that counts, at least 1.

    Raises:
        ConfigError: If `shortest` is below 1.
    """

    needs_reference = True  # prompts without a response of their own are refused before any model is loaded

    def __init__(self, shortest: int = 4) -> None:
        if shortest < 1:
            raise ConfigError(f"MyPlugin.shortest must be at least 1 letter, got {shortest}.")
        self.shortest = shortest

    def verify(self, prompts: Prompts, responses: Sequence[Response]) -> list[float]:
        """A number in [0, 1] for each response, larger is better; 1 where there is no word to find."""
        wanted = [self._words(prompt.reference or "") for prompt in prompts]
        found = [self._words(response.text) for response in responses]
        return [len(own & their) / len(own) if own else 1.0 for own, their in zip(wanted, found, strict=True)]

    def _words(self, text: str) -> set[str]:
        words = (word.strip(".,;:!?()\"'").casefold() for word in text.split())
        return {word for word in words if len(word) >= self.shortest}
