"""Configuration files: `base:` chains, several files merged into one, and the parts that they name.

This runs before jsonargparse sees anything, imports nothing heavy, and leaves every check of keys and values to it.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from distillkit import registry
from distillkit.errors import ConfigError

Config = dict[str, Any]


def load(path: str | Path, chain: tuple[Path, ...] = ()) -> Config:
    """A configuration with its `base:` files merged beneath it.

    `base:` names one file or a list, relative to the file that names them; later files win over earlier ones, and the
    file itself over all of them. `${config_dir}` in a value stands for the folder of the file that it is written in.

    Args:
        path: YAML file.
        chain: Files that led here, the outermost first.

    Raises:
        ConfigError: If a file is missing, is no valid YAML mapping, or names itself through its bases.
    """
    path = Path(path)
    if not path.is_file():
        origin = f", the base of {chain[-1]}," if chain else ""
        raise ConfigError(f"Config file {path}{origin} does not exist.")
    if path.resolve() in chain:
        raise ConfigError(f"Config file {path} is its own base through {' -> '.join(str(c) for c in chain)}.")
    try:
        text = path.read_text().replace("${config_dir}", str(path.resolve().parent))
        own = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"Config file {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(own, dict):
        raise ConfigError(f"Config file {path} must hold keys and values, got {type(own).__name__}.")
    bases = own.pop("base", [])
    merged: Config = {}
    for base in [bases] if isinstance(bases, str) else bases:
        merged = merge(merged, load(path.parent / base, (*chain, path.resolve())))
    return merge(merged, own)


def merge(below: Config, above: Config) -> Config:
    """`above` over `below`, key by key. A part that `above` replaces (another `class_path`) keeps no argument of the old."""
    if "class_path" in above and above["class_path"] != below.get("class_path"):
        return above
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The config files among command-line arguments (`--config X`, `--config=X`, `-c X`), and the other arguments."""
    files, rest = [], []
    items = iter(arguments)
    for argument in items:
        if argument in ("--config", "-c"):
            value = next(items, None)
            if value is None:
                raise ConfigError(f"{argument} needs the path of a config file.")
            files.append(value)
        elif argument.startswith("--config="):
            files.append(argument.removeprefix("--config="))
        else:
            rest.append(argument)
    return files, rest


def named_parts(config: Config, arguments: list[str]) -> dict[str, type]:
    """Imports the installed parts that a configuration or the command line names, so that short names are found.

    Args:
        config: The merged configuration.
        arguments: The other command-line arguments.

    Returns:
        The classes by name.

    Raises:
        PluginError: If a part of one of these names can't be imported, or two parts share it.
    """
    installed = {entry.name: entry.kind for entry in registry.entries()}
    candidates = {value for key, value in _strings(config) if key == "class_path" or key in _PART_KEYS}
    candidates |= {word for argument in arguments for word in re.split("[=\\s]", argument)}
    return {name: registry.get(installed[name], name) for name in sorted(candidates & installed.keys())}


_PART_KEYS = frozenset(
    ("loss", "losses", "curator", "chosen", "rejected", "generator", "teacher", "alpha", "beta", "schedule", "verifier")
)


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _strings(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, key)
    elif isinstance(value, str):
        yield key, value
