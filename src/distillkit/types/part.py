"""Parts: the objects that a configuration names by class and settings."""

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any


class Part:
    """An object that remembers its settings: the arguments of its constructor.

    They are what a run logs, and what a checkpoint needs so that the same object can be made again.
    """

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _recording(cls.__init__)  # type: ignore[method-assign]


_SETTINGS = "_settings"


def settings_of(part: Part) -> Mapping[str, Any]:
    """The arguments that a part was constructed with, by name, defaults included."""
    settings: Mapping[str, Any] = vars(part).get(_SETTINGS, {})
    return settings


def _recording(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor that also records its arguments, unless that of a subclass, which calls it, already did."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def recording(self: Part, *args: Any, **kwargs: Any) -> None:
        attributes = vars(self)  # an nn.Module takes attributes only after its own constructor has run
        if _SETTINGS not in attributes:
            try:
                bound = signature.bind(self, *args, **kwargs)
            except TypeError:
                pass  # the constructor itself raises it, with its name in the message
            else:
                _paths_to_text(bound)
                args, kwargs = bound.args[1:], bound.kwargs
                bound.apply_defaults()
                attributes[_SETTINGS] = _by_name(bound)
        init(self, *args, **kwargs)

    return recording


def _paths_to_text(bound: inspect.BoundArguments) -> None:
    """Makes text of path objects, also in lists, where a constructor takes text: settings are what a YAML can say."""
    for name, value in bound.arguments.items():
        if "Path" in str(bound.signature.parameters[name].annotation):
            continue
        if isinstance(value, PurePath):
            bound.arguments[name] = str(value)
        elif type(value) is list and any(isinstance(item, PurePath) for item in value):
            bound.arguments[name] = [str(item) if isinstance(item, PurePath) else item for item in value]


def _by_name(bound: inspect.BoundArguments) -> dict[str, Any]:
    """The arguments by name, without `self`; those of a `**kwargs` parameter are among them."""
    _, *names = bound.arguments
    settings: dict[str, Any] = {}
    for name in names:
        collects_rest = bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        settings |= bound.arguments[name] if collects_rest else {name: bound.arguments[name]}
    return settings
