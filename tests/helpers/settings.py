"""Every setting of a configuration with its type and default, read from the constructors of the built-in parts."""

import inspect
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from lightning import Callback

from distillkit.comparison.plan import KEYS
from distillkit.training import DistillData, DistillModule
from distillkit.workflows.curation import CurationTrainer
from distillkit.workflows.evaluation import EvaluationTrainer
from helpers.public import objects
from helpers.signatures import has_constructor, parameters

SECTIONS: dict[str, Callable[..., Any]] = {
    "model": DistillModule,
    "data": DistillData,
    "evaluate": EvaluationTrainer.evaluate,
    "curate": CurationTrainer.curate,
}
"""What users write before a setting, and the function that takes it."""

HANDED_OVER = ("self", "model", "datamodule")
"""Arguments of a verb's function that the command hands over."""


def setting_lines() -> list[str]:
    """The settings of a run, of the verbs, and of each class that a setting may be, as `key: type = default`."""
    lines = [line for section, function in SECTIONS.items() for line in _lines(section, function)]
    lines += [f"compare.{key}" for key in KEYS]
    return lines + [line for cls in _classes() for line in _lines(cls.__name__, cls)]


def _lines(name: str, function: Callable[..., Any]) -> list[str]:
    is_class = isinstance(function, type)
    settings = [parameter for parameter in parameters(function) if is_class or parameter.name not in HANDED_OVER]
    return [f"{name}.{parameter}" for parameter in settings]


def _classes() -> list[type]:
    """The public classes that a setting of `SECTIONS` or of one of these classes may be, and the callbacks."""
    public = [value for path, value in objects().items() if isinstance(value, type) and ".testing." not in path]
    classes = {cls for cls in public if issubclass(cls, Callback)}
    waiting = [*SECTIONS.values(), *classes]
    while waiting:
        for kind in _types(waiting.pop()):
            new = {cls for cls in (*public, kind) if issubclass(cls, kind)} - classes
            classes |= new
            waiting += new
    settable = classes - {DistillModule, DistillData}  # their settings are those of their sections
    return sorted((cls for cls in settable if has_constructor(cls)), key=lambda cls: cls.__name__)


def _types(function: Callable[..., Any]) -> Iterator[type]:
    """The classes of distillkit in the annotations of a function or constructor."""
    if isinstance(function, type) and not has_constructor(function):
        return
    for parameter in inspect.signature(function).parameters.values():
        yield from _inner_types(parameter.annotation)


def _inner_types(annotation: Any) -> Iterable[type]:
    arguments = typing.get_args(annotation)
    if isinstance(annotation, type) and annotation.__module__.startswith("distillkit.") and not arguments:
        return [annotation]
    return [kind for argument in arguments for kind in _inner_types(argument)]
