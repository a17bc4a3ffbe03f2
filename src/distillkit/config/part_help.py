"""`--KEY.help [NAME]`: the installed parts that a key takes, or the settings of one, by its short name."""

import difflib
import importlib
import inspect
import itertools
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence

import docstring_parser

from distillkit import registry
from distillkit.config.parts import part_types
from distillkit.errors import ConfigError
from distillkit.registry import Entry

CALLBACK = "callback"
CALLBACKS = {
    "Answers": "answers",
    "Budget": "budget",
    "Export": "export",
    "FiniteLoss": "finite",
    "RunCheckpoint": "checkpoint",
    "Throughput": "throughput",
}
"""The module of each callback; Lightning finds callbacks by their names, not by entry points."""

_KIND_OF_KEY = {
    "metrics": "verifier",
    "train": "source",
    "val": "source",
    "test": "source",
    "callbacks": CALLBACK,
    **{plural.rpartition(".")[2]: kind for kind, plural in registry.KINDS.items()},
    **{kind: kind for kind in (*registry.KINDS, CALLBACK)},
}
"""The kind of part that a key takes, by the key's last name."""

_FLAG = re.compile(r"--(?P<key>[\w.]+)\.help(?:=(?P<name>.*))?")


def run(arguments: Sequence[str]) -> bool:
    """Prints the help on a part, or lists the parts of a kind, if the arguments ask for that.

    Args:
        arguments: What follows the verb, such as `--model.loss.help SkewKL`.

    Returns:
        True if help was printed; False if none was asked for, or the key takes no part that is known here.

    Raises:
        ConfigError: If the key is a misspelt one that takes parts.
        PluginError: If no part has the name.
    """
    for argument, following in itertools.pairwise([*arguments, ""]):
        match = _FLAG.fullmatch(argument)
        if match is not None:
            _require_key(match["key"])
            name = match["name"] or ("" if following.startswith("-") else following)
            return _explain(match["key"], name) if name else _list(match["key"])
    return False


def _require_key(key: str) -> None:
    """Refuses a key such as `model.los`, which is one letter from a key that takes parts."""
    section, _, name = key.partition(".")
    if section not in ("model", "data", "trainer") or name in _KIND_OF_KEY:
        return
    near = difflib.get_close_matches(name, _KIND_OF_KEY, n=1, cutoff=0.85)
    if near:
        raise ConfigError(f"unknown key {key}. Did you mean {section}.{near[0]}?")


def names(kind: str) -> dict[str, str]:
    """The parts of a kind, and the first line that each says of itself. No part is imported."""
    return {entry.name: registry.summary(entry) for entry in _entries(kind)}


def _entries(kind: str) -> list[Entry]:
    if kind != CALLBACK:
        return registry.entries(kind)
    return [Entry(name, CALLBACK, f"distillkit.callbacks.{module}:{name}") for name, module in CALLBACKS.items()]


def _list(key: str) -> bool:
    kind = _KIND_OF_KEY.get(key.rpartition(".")[2])
    if kind is None:
        return False
    parts = names(kind)
    column = max(map(len, parts)) + 2
    width = max(shutil.get_terminal_size().columns - column, 20)
    for name, summary in parts.items():
        print(f"{name:<{column}}{textwrap.shorten(summary, width, placeholder=' …')}".rstrip())
    print(f"\n`--{key}.help NAME` explains one and lists its settings.")
    return True


def find(kind: str, name: str) -> type:
    """The class of a part, by its short name or its full path.

    Raises:
        PluginError: If there is none.
    """
    if kind != CALLBACK:
        return registry.get(kind, name)
    part: type = getattr(importlib.import_module(f"distillkit.callbacks.{CALLBACKS[name]}"), name)
    return part


def _explain(key: str, name: str) -> bool:
    kind = _KIND_OF_KEY.get(key.rpartition(".")[2])
    kinds = [kind] if kind is not None else registry.find(name)
    if not kinds or (kinds[0] == CALLBACK and name not in CALLBACKS):  # a class of Lightning or torch
        return False
    print(text(find(kinds[0], name), key, kinds[0]))
    return True


def text(part: type, key: str, kind: str) -> str:
    """The help on a part: its docstring, its settings with types and defaults, and how a configuration names it.

    Args:
        part: Class of the part.
        key: Key that takes the part, such as `model.loss`.
        kind: Kind of the part.
    """
    width = min(shutil.get_terminal_size().columns, 100)
    docstring = _parsed(part)
    description = "\n\n".join(filter(None, (docstring.short_description, docstring.long_description)))
    lines = [f"{part.__name__}, a {kind} ({_import_path(part)})", ""]
    for paragraph in description.split("\n\n"):
        is_text = not re.search(r"^\s|^[-*|] ", paragraph, re.MULTILINE)
        lines += [*(textwrap.wrap(paragraph, width) if is_text else paragraph.splitlines()), ""]
    settings = _settings(part)
    lines += ["Settings:" if settings else "It has no settings.", *_described(part, settings, width)]
    value = part.__name__
    if settings:
        value = f"{{class_path: {value}, init_args: {{{next(iter(settings))}: …}}}}"
    return "\n".join([*lines, "", f"In YAML: {_in_yaml(key, value)}"])


def _described(part: type, settings: Mapping[str, inspect.Parameter], width: int) -> Iterator[str]:
    """Two or more lines for each setting: its type and default, and what it is."""
    hints = part_types(part)
    texts = {entry.arg_name: entry.description for owner in reversed(part.__mro__) for entry in _parsed(owner).params}
    for name, parameter in settings.items():
        default = "required" if parameter.default is parameter.empty else f"default {_value(parameter.default)}"
        yield f"  {name}: {_type(hints.get(name, parameter.annotation))}, {default}"
        indent = " " * 6
        yield from textwrap.wrap(texts.get(name) or "", width, initial_indent=indent, subsequent_indent=indent)


def _in_yaml(key: str, value: str) -> str:
    section, _, name = key.rpartition(".")
    if section.partition(".")[0] not in ("model", "data", "trainer"):
        return value
    return f"{name}: " + {"callbacks": f"[{value}]", "metrics": f"{{NAME: {value}}}"}.get(name, value)


def _parsed(part: type) -> docstring_parser.Docstring:
    return docstring_parser.parse(vars(part).get("__doc__") or "", docstring_parser.DocstringStyle.GOOGLE)


def _import_path(part: type) -> str:
    """The shortest path that a class can be imported by."""
    module = part.__module__
    parent = module.rpartition(".")[0]
    while parent and getattr(importlib.import_module(parent), part.__name__, None) is part:
        module, parent = parent, parent.rpartition(".")[0]
    return f"{module}.{part.__name__}"


def _settings(part: type) -> dict[str, inspect.Parameter]:
    """The parameters of a class's constructor, with those of its base class where it hands `**kwargs` on."""
    settings: dict[str, inspect.Parameter] = {}
    for owner in part.__mro__:
        if "__init__" not in vars(owner) or owner is object:
            continue
        parameters = list(inspect.signature(vars(owner)["__init__"]).parameters.values())[1:]
        named = [each for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
        settings |= {each.name: each for each in named if each.name not in settings}
        if not any(each.kind is each.VAR_KEYWORD for each in parameters):
            break
    return settings


def _type(annotation: object) -> str:
    """A type in words that say what to write in YAML."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (None, types.NoneType):
        return "null"
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_type, arguments))
    if origin is typing.Literal:
        return " or ".join(map(str, arguments))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"mapping of {_type(arguments[-1])}"
    if isinstance(origin, type) and issubclass(origin, Iterable) and arguments:
        return f"list of {_type(arguments[0])}"
    return _WORDS.get(annotation.__name__, annotation.__name__) if isinstance(annotation, type) else str(annotation)


def _value(default: object) -> str:
    """A default as YAML writes it, or a part by its name."""
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    if isinstance(default, str | int | float | list | tuple | dict):
        return str(list(default) if isinstance(default, tuple) else default)
    return default.__name__ if isinstance(default, type) else type(default).__name__


_WORDS = {"str": "text", "bool": "true or false", "int": "integer", "float": "number"}
