"""A command as the user entered it: config files, and the arguments that override them."""

import inspect
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distillkit.config import yaml_loader
from distillkit.config.files import SOURCES, Config, MergedConfig

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Command:
    """A command as the user entered it.

    Args:
        config: The merged config files.
        arguments: Command-line arguments without the config files.
        roots: Classes of the top-level keys, such as `model`.
    """

    config: MergedConfig = field(default_factory=MergedConfig)
    arguments: tuple[str, ...] = ()
    roots: Mapping[str, type] = field(default_factory=dict)

    def origin(self, path: str) -> str:
        """The config file that sets a key, or `command line`; empty if neither does.

        Args:
            path: The key as users write it, such as `model.loss.alpha`.
        """
        keys = [key.rstrip("+").replace(".init_args", "") for key, _ in self._settings()]
        is_argument = any(f"{key}.".startswith(f"{path}.") or f"{path}.".startswith(f"{key}.") for key in keys)
        return COMMAND_LINE if is_argument else self.config.origin(path)

    def located(self, path: str) -> str:
        """A key after the place where it is set, such as `run.yaml: model.loss.alpha`; the key alone if it is not set.

        Args:
            path: The key as users write it, with the index of a list's item in brackets.
        """
        origin = self.origin(path.partition("[")[0])
        return f"{origin}: {path}" if origin else path

    def content(self) -> Config:
        """The config files with the arguments over them, before any check."""
        content: object = self.config.content
        for key, value in self._settings():
            content = _with_value(content, key.split("."), _parsed(value))
        assert isinstance(content, dict)
        return content

    def _settings(self) -> list[tuple[str, str]]:
        """Key and text of each argument `--key=value` or `--key value`."""
        settings = []
        for argument, following in itertools.pairwise((*self.arguments, "")):
            if argument.startswith("--"):
                key, separator, value = argument[2:].partition("=")
                settings.append((key, value if separator or following.startswith("--") else following))
        return settings


def with_flag_values(arguments: Sequence[str], method: Callable[..., object]) -> list[str]:
    """The arguments of a verb, with `=true` after each flag that has no value, such as `--overwrite`.

    Args:
        arguments: Command-line arguments without the config files.
        method: The verb's method; its parameters of type `bool` are the flags.
    """
    flags = {
        f"--{name}" for name, parameter in inspect.signature(method).parameters.items() if parameter.annotation is bool
    }
    return [
        f"{argument}=true" if argument in flags and following.lower() not in _BOOLEANS else argument
        for argument, following in itertools.pairwise([*arguments, ""])
    ]


def with_source_paths(arguments: Sequence[str]) -> list[str]:
    """The arguments, with `--data.train FILE` as `--data.train.path FILE` where others set more of that source.

    Args:
        arguments: Command-line arguments without the config files.
    """
    result = list(arguments)
    for key in (f"--data.{name}" for name in SOURCES):
        if not any(argument.startswith(f"{key}.") for argument in arguments):
            continue
        for index, argument in enumerate(arguments):
            flag, separator, value = argument.partition("=")
            value = value if separator else "".join(arguments[index + 1 : index + 2])
            if flag == key and (Path(value).exists() or not _CLASS_NAME.fullmatch(value)):
                result[index] = f"{key}.path{separator}{argument.partition('=')[2]}"
    return result


_CLASS_NAME = re.compile(r"(\w+\.)*[A-Z]\w*")
_BOOLEANS = ("true", "false", "yes", "no", "on", "off", "0", "1")


def _parsed(text: str) -> object:
    """An argument's value as YAML; the text itself if it is none, which the parser reports."""
    try:
        return yaml_loader.parse(text, Path.cwd())
    except ValueError:
        return text


def _with_value(config: object, keys: list[str], value: object) -> object:
    """A configuration with a value at a key, below which a part's `init_args` may be left out."""
    if not keys:
        is_other_class = isinstance(value, str) and isinstance(config, dict) and "class_path" in config
        return {**config, "class_path": value} if is_other_class and isinstance(config, dict) else value
    key, rest = keys[0], keys[1:]
    if isinstance(config, list):  # arguments go to the last part of a list
        return [*config[:-1], *(_with_value(item, keys, value) for item in config[-1:])]
    if isinstance(config, str):
        config = {"class_path": config}
    settings: Config = dict(config) if isinstance(config, dict) else {}
    if "class_path" in settings and key not in ("class_path", "init_args", "dict_kwargs"):
        return {**settings, "init_args": _with_value(settings.get("init_args"), keys, value)}
    if key.endswith("+"):
        key = key.removesuffix("+")
        value = [*_listed(settings.get(key)), *_listed(value)]
    return {**settings, key: _with_value(settings.get(key), rest, value)}


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else [] if value is None else [value]
