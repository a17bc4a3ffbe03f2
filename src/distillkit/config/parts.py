"""Parts named in a configuration: finds the class behind each short name by the types of constructors' parameters."""

import collections.abc
import inspect
import pydoc
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path

from distillkit import registry
from distillkit.config import files
from distillkit.config.command import Command
from distillkit.errors import ConfigError, PluginError


def import_parts(command: Command) -> None:
    """Imports the installed parts that a command names, so that the parser finds their short names.

    Raises:
        ConfigError: If a setting is null that can't be: the parser passes over null.
        PluginError: If no part with the name is installed, several parts have it, or its import fails.
    """
    if any(re.match(r"-h$|--help(\.|$)|--[\w.]+\.help(=|$)", argument) for argument in command.arguments):
        for kind in registry.KINDS:
            registry.load_all(kind)  # help lists all parts
    # A part that an argument replaces is parsed too, so its class must be known as well.
    for content, is_final in ((command.content(), True), (command.config.content, False)):
        finder = _Finder(command, refuses_null=is_final)
        for key, value in content.items():
            finder.visit(value, command.roots.get(key), key)


def part_types(part: type) -> dict[str, object]:
    """The type of each parameter of a class's constructor; one that can't be evaluated is left out."""
    result: dict[str, object] = {}
    for owner in reversed(part.__mro__):  # a constructor may hand `**kwargs` to that of its base class
        constructor = inspect.unwrap(vars(owner).get("__init__", object.__init__))
        if not isinstance(constructor, types.FunctionType):
            continue
        for name, annotation in constructor.__annotations__.items():
            holder = types.SimpleNamespace(__annotations__={name: annotation})
            try:
                result |= typing.get_type_hints(holder, constructor.__globals__)
            except (NameError, AttributeError, TypeError, SyntaxError):  # imported for type checkers alone
                result.pop(name, None)
    return result


def accepts(annotation: object, interface: type) -> bool:
    """True if a parameter of this type takes a part with the interface directly, not in a list or a mapping."""
    return any(isinstance(member, type) and issubclass(member, interface) for member in members(annotation))


def members(annotation: object) -> Iterator[object]:
    """The types that a type stands for: members of a union, and what a function returns."""
    if isinstance(annotation, typing.TypeVar):
        return
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        for argument in arguments:
            yield from members(argument)
    elif origin is typing.Annotated:
        yield from members(arguments[0])
    elif origin is collections.abc.Callable:
        yield from members(arguments[-1] if arguments else None)
    elif annotation is not None:
        yield annotation


def items(annotation: object) -> object:
    """The type of the items of a list, or of the values of a mapping; None if it takes neither."""
    result: object = None
    for member in members(annotation):
        origin, arguments = typing.get_origin(member), typing.get_args(member)
        if isinstance(origin, type) and issubclass(origin, collections.abc.Iterable) and arguments:
            item = arguments[-1] if issubclass(origin, collections.abc.Mapping) else arguments[0]
            result = item if result is None else typing.Union[result, item]  # noqa: UP007 - of two values
    return result


class _Finder:
    """Imports the parts that a command names.

    Args:
        command: The command.
        refuses_null: Whether a null in a setting that can't be null is an error, and a part without its class.
    """

    def __init__(self, command: Command, refuses_null: bool) -> None:
        self.command, self.refuses_null = command, refuses_null
        self.kinds: dict[str, list[str]] = {}  # of the installed parts, by name
        for entry in registry.entries():
            self.kinds.setdefault(entry.name, []).append(entry.kind)

    def visit(self, value: object, annotation: object, path: str) -> None:
        """Imports the parts that a value names, and those within it.

        Args:
            value: Value of a setting.
            annotation: Type of the setting; None if it is unknown.
            path: The setting's key as users write it.
        """
        classes = [member for member in members(annotation) if isinstance(member, type)]
        if isinstance(value, list):
            for index, item in enumerate(value):
                self.visit(item, items(annotation), f"{path}[{index}]")
        elif isinstance(value, str) and str not in classes:
            if value.isidentifier() and classes:
                self._find(value, classes, path)
            elif Path(value).suffix in (".yaml", ".yml", ".json") and Path(value).is_file():
                self.visit(files.load(value), annotation, path)
        elif isinstance(value, dict):
            name = value.get("class_path")
            settings: object = value
            if isinstance(name, str):
                part = self._find(name, classes, path)
                classes, settings = [] if part is None else [part], value.get("init_args")
            elif self.refuses_null:
                self._require_class(value, classes, path)
            if isinstance(settings, dict):
                types_by_key = {key: hint for part in classes for key, hint in part_types(part).items()}
                for key, item in settings.items():
                    owners = [part for part in classes if key in part_types(part)]
                    if item is None and self.refuses_null and owners and not any(_takes_null(p, key) for p in owners):
                        where = self.command.located(f"{path}.{key}")
                        raise ConfigError(f"{where} can't be null. Set it, or leave it out for its default.")
                    self.visit(item, types_by_key.get(key, items(annotation)), f"{path}.{key}")

    def _require_class(self, settings: dict[str, object], classes: list[type], path: str) -> None:
        """Refuses settings of a part whose class is not said, where none is the default."""
        accepted = [part for part in classes if part is not types.NoneType]
        kinds = [registry.kind_of(part) for part in accepted if inspect.isabstract(part)]
        if not kinds or len(kinds) < len(accepted) or kinds[0] is None:
            return
        names = settings.get("init_args") or settings
        keys = list(names) if isinstance(names, dict) else []
        parts = registry.load_all(kinds[0])
        fitting = [name for name, part in parts.items() if part_types(part).keys() >= set(keys)]
        listed = f"These have them: {', '.join(fitting)}" if fitting else f"There are {', '.join(parts)}"
        raise ConfigError(
            f"{self.command.located(path)} has settings ({', '.join(keys)}) but no class. Name it too, by "
            f"--{path}=NAME or class_path in a file. {listed}."
        )

    def _find(self, name: str, classes: list[type], path: str) -> type | None:
        """The class with a name among installed parts and loaded subclasses; None if the parser has to find it."""
        if not name.isidentifier():
            return _located(name)
        accepted = list(filter(None, map(registry.kind_of, classes)))
        loaded = next((part for base in classes for part in _subclasses(base) if part.__name__ == name), None)
        kind = next((kind for kind in self.kinds.get(name, []) if kind in accepted or not classes), None)
        if kind is None and (loaded is not None or not accepted):
            return loaded
        try:
            return registry.get(kind or accepted[0], name)
        except PluginError as error:
            raise PluginError(f"{self.command.located(path)}: {error}") from error.__cause__


def _takes_null(part: type, name: str) -> bool:
    """True unless a class has a parameter of this name whose type leaves out null; Lightning reads null as it likes."""
    kinds = list(members(part_types(part).get(name)))
    if not kinds or part.__module__.startswith("lightning."):
        return True
    return any(kind in (types.NoneType, typing.Any, object) for kind in kinds) or _default(part, name) is None


def _default(part: type, name: str) -> object:
    """The default of a parameter of a class's constructor, or of that of a base class."""
    for owner in part.__mro__:
        parameters = inspect.signature(vars(owner)["__init__"]).parameters if "__init__" in vars(owner) else {}
        if name in parameters:
            return parameters[name].default
    return inspect.Parameter.empty


def _located(path: str) -> type | None:
    """The class with a full path; None if it can't be imported, which the parser reports."""
    try:
        part = pydoc.locate(path)
    except pydoc.ErrorDuringImport:
        return None
    return part if isinstance(part, type) else None


def _subclasses(part: type) -> Iterator[type]:
    """A class and all its loaded subclasses, of which builtin types have too many."""
    yield part
    if part.__module__ != "builtins":
        subclasses: list[type] = type.__subclasses__(part)
        for subclass in subclasses:
            yield from _subclasses(subclass)
