"""Exceptions raised on purpose. The command line shows each as one line; anything else keeps its traceback."""

from collections.abc import Sequence
from typing import Any


class DistillKitError(Exception):
    """Base of every error that distillkit raises on purpose: it says what, where and what to do."""


class ConfigError(DistillKitError):
    """A setting is unknown, missing or outside its range."""


class DataError(DistillKitError):
    """A prompt, response or data file is malformed."""


class ModelError(DistillKitError):
    """A model or tokenizer is missing, broken or does not fit the run."""


class PluginError(DistillKitError):
    """A part is unknown, ambiguous or can't be imported."""


class StoreError(DistillKitError):
    """A response store is damaged or was written by an incompatible version."""


class GenerationError(DistillKitError):
    """A generator gave up before it had answered every prompt.

    Args:
        message: What, where and what to do.
        finished: The `Response`s of those prompts that it had answered, in any order: they are kept, so that a later
            attempt asks for the others alone.
    """

    def __init__(self, message: str, finished: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.finished = tuple(finished)


class TrainingError(DistillKitError):
    """Training can't go on: its loss is no number."""


class ServerError(DistillKitError):
    """A server can't be reached, refuses, or does not answer as it should."""
