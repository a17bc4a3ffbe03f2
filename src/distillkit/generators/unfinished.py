"""What a generator raises that had to stop part of the way."""

from collections.abc import Sequence

from distillkit.errors import DistillKitError
from distillkit.types import Response


class UnfinishedError(DistillKitError):
    """A generator stopped part of the way; what it had finished is kept.

    Args:
        message: Why, and how to go on.
        finished: The responses that were finished.
    """

    def __init__(self, message: str, finished: Sequence[Response]) -> None:
        super().__init__(message)
        self.finished = tuple(finished)
