"""Configuration files: `base:` chains, several files merged into one, and the parts that they name.

This runs before jsonargparse sees anything, imports nothing heavy, and leaves every check of keys and values to it.
"""

import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from distillkit import registry
from distillkit.errors import ConfigError, PluginError

Config = dict[str, Any]


def load(path: str | Path, chain: tuple[Path, ...] = ()) -> Config:
    """A configuration with its `base:` files merged beneath it.

    `base:` names one file or a list, relative to the file that names them; later files win over earlier ones, and the
    file itself over all of them. `${config_dir}` in a value stands for the folder of the file that it is written in.

    Args:
        path: YAML file, or `pkg:PACKAGE/FILE` for one that an installed package holds.
        chain: Files that led here, the outermost first.

    Raises:
        ConfigError: If a file is missing, is no valid YAML mapping, or names itself through its bases.
    """
    return resolved(read(path, chain), path, chain)


def read(path: str | Path, chain: tuple[Path, ...] = ()) -> Config:
    """The keys and values of one file, as they stand in it.

    Args:
        path: YAML file, or `pkg:PACKAGE/FILE` for one that an installed package holds.
        chain: Files that led here, the outermost first.

    Raises:
        ConfigError: If the file is missing or no valid YAML mapping, or among those that led here.
    """
    path = located(path)
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
    return own


def resolved(own: Config, path: str | Path, chain: tuple[Path, ...] = ()) -> Config:
    """A configuration that stands in a file, with its bases merged beneath it.

    Args:
        own: The configuration.
        path: The file.
        chain: Files that led there, the outermost first.

    Raises:
        ConfigError: As `load` does.
    """
    path = located(path)
    bases = own.get("base", [])
    merged: Config = {}
    for base in [bases] if isinstance(bases, str) else bases:
        own_base = base if str(base).startswith(_PACKAGE) else path.parent / base
        merged = merge(merged, load(own_base, (*chain, path.resolve())))
    return merge(merged, {key: value for key, value in own.items() if key != "base"})


_PACKAGE = "pkg:"


def located(path: str | Path) -> Path:
    """The file that a path names; `pkg:PACKAGE/FILE` is a file of an installed package, which is not imported.

    Raises:
        ConfigError: If there is no such package.
    """
    text = str(path)
    if not text.startswith(_PACKAGE):
        return Path(path)
    package, _, file = text.removeprefix(_PACKAGE).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"Config file {text} is in a package {package!r}, which is not installed: {_PACKAGE}PACKAGE/FILE names a "
            "file of an installed one."
        )
    return Path(spec.submodule_search_locations[0]) / file


def merge(below: Config, above: Config) -> Config:
    """`above` over `below`, key by key; a part replaced by another `class_path` keeps no argument of the old."""
    if "class_path" in above and above["class_path"] != below.get("class_path"):
        return above
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def load_all(paths: Sequence[str]) -> Config:
    """Several configurations as one, later ones over earlier ones."""
    merged: Config = {}
    for path in paths:
        merged = merge(merged, load(path))
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


PART_KEYS = {
    "loss": "loss", "losses": "loss", "curator": "curator", "chosen": "curator", "rejected": "curator",
    "generator": "generator", "teacher": "teacher", "alpha": "schedule", "beta": "schedule", "verifier": "verifier",
    "parts": "curator", "shares": "schedule", "replay": "schedule", "metrics.": "verifier",
}  # fmt: skip
"""Keys of the built-in parts that take a part, and its kind; one with a full stop takes parts by names."""


def named_parts(config: Config, arguments: list[str]) -> list[type]:
    """Imports the installed parts that a configuration or the command line names, so that short names are found.

    Args:
        config: The merged configuration.
        arguments: The other command-line arguments.

    Returns:
        The classes.

    Raises:
        PluginError: If no part of a name is installed, two parts share it, or it can't be imported.
    """
    installed = {entry.name: entry.kind for entry in registry.entries()}
    found: dict[str, type] = {}
    for path, name in (*_names(config), *_argument_names(arguments)):
        _, above, key = re.sub(r"(\.class_path|\[\d+\])+$", "", ".." + path).rsplit(".", 2)
        kind = installed.get(name) or PART_KEYS.get(key) or PART_KEYS.get(f"{above}.")
        if not name.isidentifier() or kind is None or name in found:
            continue
        try:
            found[name] = registry.get(kind, name)
        except PluginError as error:
            raise PluginError(f"{path.removesuffix('.class_path')}: {error}") from error.__cause__
    return list(found.values())


def _names(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every string below `value` that may name a part, with where it stands."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            here = path if key == "init_args" else f"{path}.{key}".lstrip(".")
            if isinstance(inner, str):
                above = f"{path.rpartition('.')[2]}."
                if key == "class_path" or key in PART_KEYS or above in PART_KEYS:
                    yield here, inner
            else:
                yield from _names(inner, here)
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from ([(f"{path}[{place}]", inner)] if isinstance(inner, str) else _names(inner, f"{path}[{place}]"))


def _argument_names(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """As `_names`, for `--key value` and `--key=value`."""
    for place, argument in enumerate(arguments):
        if argument.startswith("--"):
            key, given, value = argument[2:].partition("=")
            value = value if given else "".join(arguments[place + 1 : place + 2])
            if value.startswith(("{", "[")):
                yield from _names(_parsed(value), key)
            above, _, last = key.rpartition(".")
            if last == "class_path" or last in PART_KEYS or f"{above.rpartition('.')[2]}." in PART_KEYS:
                yield key.replace(".init_args", ""), value


def _parsed(text: str) -> Any:
    """A value as YAML; jsonargparse says what is wrong with one that is none."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def path_of(config: Any, key: str, above: str = "") -> str:
    """Where `key` stands in a configuration, as users write it (`model.loss.alpha`); empty if it does not."""
    if isinstance(config, Mapping):
        for name, inner in config.items():
            here = above if name in ("init_args", "class_path") else f"{above}.{name}".lstrip(".")
            if name == key:
                return here
            found = path_of(inner, key, here)
            if found:
                return found
    if isinstance(config, list):
        found_in_items = (path_of(inner, key, f"{above}[{place}]") for place, inner in enumerate(config))
        return next(filter(None, found_in_items), "")
    return ""
