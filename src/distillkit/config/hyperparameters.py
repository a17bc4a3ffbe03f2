"""Hyperparameters: the settings of parts as plain values, which are logged, and the parts built from them again.

A part is written as in a configuration: `{class_path: ..., init_args: {...}}`, with its defaults.
"""

import functools
import importlib
import inspect
import itertools
import numbers
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from distillkit import registry
from distillkit.errors import ModelError
from distillkit.remote import consent
from distillkit.types.part import Part, settings_of

NOT_RECORDED = "(not recorded) "
"""Start of the text in place of a value that is not plain, such as a function, followed by the name of its class."""

_SECRET = re.compile(
    r"^token$|(api|access|auth|bearer|hf|hub|private|secret|session)[-_]?(key|token)$"
    r"|secret$|passw(or)?d$|credentials?$|^authorization$",
    re.IGNORECASE,
)
_URL_WITH_PASSWORD = re.compile(r"://[^/@\s]+@")
_FACTORIES = (Optimizer, LRScheduler)  # classes that a run calls, with the parameters and with the optimizer
_CONSENTS = {"allow_execution": "code", "trust_remote_code": "remote_code"}
"""Settings that let code of others run, with the permission that they need if a checkpoint contains them."""


def describe(value: object, name: str = "") -> Any:
    """Returns a value as plain data: None, booleans, numbers, strings, lists, and dictionaries with string keys.

    Args:
        value: A part, a dataclass, a factory of an optimizer or of a learning-rate schedule, or plain data.
        name: Name of the setting; a text is left out where the name says that it is a secret, such as `api_key`.

    Returns:
        The plain data. A value that can't be described is replaced by `NOT_RECORDED` and the name of its class.
    """
    match value:
        case None | bool():
            return value
        case numbers.Integral():
            return int(value)
        case numbers.Real():
            return float(value)
        case str() | os.PathLike():
            text = str(os.fspath(value))
            return f"{NOT_RECORDED}secret" if _SECRET.search(name) or _URL_WITH_PASSWORD.search(text) else text
        case list() | tuple():
            return [describe(item) for item in value]
        case Mapping() if all(isinstance(key, str) for key in value):
            return {str(key): describe(item, key) for key, item in value.items()}
    specification = _specification(value)
    if specification is None:
        return f"{NOT_RECORDED}{_path(type(value))}"
    cls, settings = specification
    return {"class_path": _path(cls), "init_args": {name: describe(item, name) for name, item in settings.items()}}


def _specification(value: object) -> tuple[type, Mapping[str, Any]] | None:
    """The class and the settings that make a value; None if they are not known."""
    if is_dataclass(value) and not isinstance(value, type):
        return type(value), {field.name: vars(value)[field.name] for field in fields(value) if field.init}
    if isinstance(value, Part):
        return type(value), settings_of(value)
    if isinstance(value, type) and issubclass(value, _FACTORIES):
        return value, _defaults(value)
    if isinstance(value, functools.partial):
        # jsonargparse's factories are partials of a function that takes the class.
        *_, cls = (value.func, *value.args)
        if isinstance(cls, type) and issubclass(cls, _FACTORIES):
            return cls, _defaults(cls) | value.keywords
    return None


def _defaults(factory: type) -> dict[str, Any]:
    parameters = inspect.signature(factory).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


def _path(cls: type) -> str:
    """The import path of a class: the shortest, which is its public one and outlives a file that moves."""
    for package in itertools.accumulate(cls.__module__.split("."), "{}.{}".format):
        if getattr(sys.modules.get(package), cls.__qualname__, None) is cls:
            return f"{package}.{cls.__qualname__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def build(description: object) -> Any:
    """Returns what `describe` described.

    Args:
        description: Plain data.

    Raises:
        ConfigError: If a setting lets code of others run, and the user's environment does not permit it.
        ModelError: If a value was not recorded, or a class does not exist, is not that of a part, or is in a module
            that is neither imported nor part of an installed plugin.
    """
    if isinstance(description, str) and description.startswith(NOT_RECORDED):
        raise ModelError(f"It was not recorded, since it is no plain value: {description[len(NOT_RECORDED) :]}.")
    if isinstance(description, list):
        return [build(item) for item in description]
    if not isinstance(description, Mapping):
        return description
    for name in _CONSENTS.keys() & description.keys():
        if description[name]:
            consent.require(_CONSENTS[name], f"The setting {name} lets code of others run")
    values = {key: build(item) for key, item in description.items() if key != "class_path"}
    if "class_path" not in description:
        return values
    cls = _class(description["class_path"])
    settings = values.get("init_args", {})
    if issubclass(cls, _FACTORIES):
        return functools.partial(cls, **settings)
    return construct(cls, settings)


def construct(cls: type, settings: Mapping[str, Any]) -> Any:
    """Calls a class with settings by name.

    Raises:
        ModelError: If it does not take these settings.
    """
    try:
        inspect.signature(cls).bind(**settings)
    except TypeError as error:
        raise ModelError(f"{_path(cls)} can't be made with these settings: {error}.") from None
    return cls(**settings)


def _class(path: str) -> type:
    """The class of a part, by its import path.

    A checkpoint may come from anywhere: it must not decide which code is imported.
    """
    module_name, _, name = path.rpartition(".")
    package = module_name.partition(".")[0]
    installed = {re.split("[.:]", entry.target)[0] for entry in registry.entries()}
    if module_name not in sys.modules and package not in {"distillkit", *installed}:
        raise ModelError(f"{path} is not part of an installed plugin. If you trust it, import {module_name} first.")
    try:
        cls = getattr(
            importlib.import_module(module_name), name, None
        )  # by getattr: packages import names on first use
    except ImportError as error:
        raise ModelError(f"{path} can't be imported: {error}.") from error
    if not isinstance(cls, type) or not (issubclass(cls, (Part, *_FACTORIES)) or is_dataclass(cls)):
        raise ModelError(f"{path} is not the class of a part.")
    return cls
