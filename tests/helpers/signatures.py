"""Signatures as text that depends neither on the Python version nor on where other packages define their classes."""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator, Set
from typing import Any

_MODULES = re.compile(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])")
_DISTILLKIT = re.compile(r"distillkit\b")


class _Text:
    """Text that a signature prints as it is."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def type_text(annotation: object) -> str:
    """An annotation without the modules of its classes."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " | ".join(map(type_text, typing.get_args(annotation)))
    if annotation in (None, types.NoneType):
        return "None"
    return _MODULES.sub("", annotation if isinstance(annotation, str) else inspect.formatannotation(annotation))


def value_text(value: object) -> str:
    """A value; of a class or function its name."""
    if isinstance(value, type) or inspect.isroutine(value):
        return value.__qualname__
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of a function or of a constructor, `self` included where it is one."""
    return [
        parameter.replace(
            annotation=_Text(type_text(parameter.annotation)) if parameter.annotation is not _EMPTY else _EMPTY,
            default=_Text(value_text(parameter.default)) if parameter.default is not _EMPTY else _EMPTY,
        )
        for parameter in inspect.signature(function).parameters.values()
    ]


_EMPTY = inspect.Parameter.empty


def describe(path: str, value: object, public: Set[type]) -> Iterator[str]:
    """A line for a public object and for each public attribute that it does not share with another public class.

    Args:
        path: Path of the object.
        value: The object.
        public: All public classes: what they have is not repeated for their subclasses.
    """
    if isinstance(value, type):
        yield f"class {path}{_constructor(value)}"
        for name, attribute in sorted(_attributes(value, public).items()):
            yield from _attribute(f"{path}.{name}", attribute)
    elif inspect.isroutine(value):
        yield f"def {path}{_signature(value)}"
    elif isinstance(value, str | int | float | dict):
        yield f"{path} = {value_text(value)}"
    else:  # an alias of a type
        yield f"{path} = {type_text(value)}"


def has_constructor(cls: type) -> bool:
    """True if distillkit, not another package, defines the constructor of a class."""
    owner = next(base for base in cls.__mro__ if "__init__" in vars(base) or hasattr(base, "_fields"))
    return bool(_DISTILLKIT.match(owner.__module__)) and not getattr(owner, "_is_protocol", False)


def _constructor(cls: type) -> str:
    bases = [base.__name__ for base in cls.__bases__ if base.__module__ not in ("builtins", "abc", "typing")]
    derived = f", a {', '.join(bases)}" if bases else ""
    if not has_constructor(cls):
        return derived
    return f"{inspect.Signature(parameters(cls))}{derived}"


def _signature(function: Callable[..., Any]) -> str:
    result = inspect.signature(function).return_annotation
    shown = _EMPTY if result is _EMPTY else _Text(type_text(result))
    return str(inspect.Signature(parameters(function), return_annotation=shown))


def _attributes(cls: type, public: Set[type]) -> dict[str, object]:
    """Public attributes that a class and its private bases in distillkit define; not those that a public base has.

    The hooks of Lightning's classes are not listed either: Lightning calls them.
    """
    inherited = [base for base in cls.__mro__[1:] if base in public or base.__module__.startswith("lightning.")]
    result: dict[str, object] = {}
    for base in reversed(cls.__mro__):
        if _DISTILLKIT.match(base.__module__) and (base is cls or base not in public):
            fields = [field.name for field in dataclasses.fields(base)] if dataclasses.is_dataclass(base) else ()
            fields = getattr(base, "_fields", fields)
            declared = {name: _Text(type_text(kind)) for name, kind in inspect.get_annotations(base).items()}
            result |= {name: value for name, value in (declared | vars(base)).items() if name not in fields}
    return {
        name: value
        for name, value in result.items()
        if not name.startswith("_") and not any(hasattr(base, name) for base in inherited)
    }


def _attribute(path: str, value: object) -> Iterator[str]:
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    if isinstance(value, property):
        yield f"{path}: {type_text(inspect.signature(value.fget).return_annotation)}" if value.fget else path
    elif inspect.isfunction(value):
        yield f"def {path}{_signature(value)}"
    elif hasattr(value, "func"):  # a cached property, or a method with some of its arguments
        yield path
    elif isinstance(value, _Text):
        yield f"{path}: {value!r}"
    else:
        yield f"{path} = {value_text(value)}"
