"""Exceptions raised on purpose. The command line shows each as one line; anything else keeps its traceback."""


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


class ServerError(DistillKitError):
    """A server can't be reached, refuses, or does not answer as it should."""
