"""A filter: decides which responses are not trained on."""

from distillkit.errors import ConfigError
from distillkit.interfaces import ResponseFilter
from distillkit.types import Row


class MyPlugin(ResponseFilter):
    """Refuses a response with too few tokens.

    Args:
        min_tokens: Smallest accepted number of tokens, at least 1, end of turn included.

    Raises:
        ConfigError: If `min_tokens` is below 1.
    """

    reason = "too short"

    def __init__(self, min_tokens: int = 4) -> None:
        if min_tokens < 1:
            raise ConfigError(f"MyPlugin.min_tokens must be at least 1, got {min_tokens}.")
        self.min_tokens = min_tokens

    def refuses(self, row: Row) -> bool:
        """Returns True if the response is shorter."""
        return sum(row.response_mask) < self.min_tokens
