"""Exceptions raised on purpose, the range check that raises one, and text from outside that is safe to show.

The command line shows each as one line; anything else keeps its traceback.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, SupportsFloat

__all__ = [
    "ConfigError",
    "DataError",
    "DistillKitError",
    "GenerationError",
    "ModelError",
    "PluginError",
    "ServerError",
    "StoreError",
    "TrainingError",
    "check_range",
]

LONGEST_MESSAGE = 2000
"""Characters of a message; of a longer one, the middle is left out."""


def one_line(text: str, limit: int = LONGEST_MESSAGE) -> str:
    """A text from outside as one line that any terminal can show.

    Args:
        text: Any text, such as a model's answer or a part of a file.
        limit: Most characters of the result; of a longer text, the middle is replaced by an ellipsis.

    Returns:
        The text with line breaks as spaces, and control characters (a terminal's escape sequences begin with one) and
        lone surrogates as escapes.
    """
    ends = _printable(text[:limit]), _printable(text[-limit:])
    line = ends[0] if len(text) <= limit else "".join(ends)
    return line if len(line) <= limit else f"{ends[0][: limit // 2]} … {ends[1][limit // 2 + 3 - limit :]}"


def readable(text: str) -> str:
    """A text from outside, with its line breaks, that any terminal or page can show: see `one_line`."""
    return "\n".join(_printable(line) for line in text.splitlines())


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else _ESCAPES.get(one) or ascii(one)[1:-1] for one in text)


_ESCAPES = {"\n": " ", "\t": " ", "\r": " "}


class DistillKitError(Exception):
    """Base of all distillkit errors. The message says what is wrong, where, and what to do, on one line."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class ConfigError(DistillKitError):
    """A setting is unknown, missing or out of range."""


class DataError(DistillKitError):
    """A prompt, response or data file is malformed."""


class ModelError(DistillKitError):
    """A model or tokenizer is missing, broken or does not fit the run."""


class PluginError(DistillKitError):
    """A part is unknown or ambiguous, can't be imported, or returns what its interface does not allow."""


class StoreError(DistillKitError):
    """A response store is damaged or was written by an incompatible version."""


class GenerationError(DistillKitError):
    """A generator stopped before it had answered every prompt.

    Args:
        message: Says what is wrong, where, and what to do.
        finished: The `Response`s received so far, in any order. They are saved, so that the next attempt only requests
            the rest.
    """

    def __init__(self, message: str, finished: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.finished = tuple(finished)


class TrainingError(DistillKitError):
    """Training can't continue, for example because the loss is NaN."""


class ServerError(DistillKitError):
    """A server can't be reached, refuses a request or returns an invalid response."""


def check_range(
    name: str,
    value: float | None,
    low: float,
    high: float = math.inf,
    closed: Literal["both", "left", "right", "neither"] = "both",
    note: str = "",
) -> None:
    """Refuses a number outside its range; None, an option that is not set, passes.

    Args:
        name: The setting as users write it, such as `Source.limit`.
        value: The number to check.
        low: Lower end of the range.
        high: Upper end of the range; infinity for none.
        closed: Ends that belong to the range.
        note: Text appended to the range in the message, with the space or comma before it.

    Raises:
        ConfigError: If the number is outside the range or NaN, or it is no number.
    """
    if value is None:
        return
    if not isinstance(value, SupportsFloat):
        raise ConfigError(f"{name} must be a number, got {value!r}.")
    has_low, has_high = closed in ("both", "left"), closed in ("both", "right")
    if (value >= low if has_low else value > low) and (value <= high if has_high else value < high):
        return
    if high == math.inf:
        limits = f"be {'at least' if has_low else 'above'} {low}"
    else:
        limits = f"lie in {'[' if has_low else '('}{low}, {high}{']' if has_high else ')'}"
    raise ConfigError(f"{name} must {limits}{note}, got {value}.")
