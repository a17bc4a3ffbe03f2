"""Configuration files: loads YAML, follows `base:` chains and merges several files into one.

This runs before jsonargparse, which checks keys and values, and imports nothing heavy.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distillkit.config import methods, packaged, yaml_loader
from distillkit.config.methods import Method
from distillkit.config.packaged import locate
from distillkit.errors import ConfigError

Config = dict[str, Any]


@dataclass(frozen=True)
class MergedConfig:
    """Configuration files merged into one.

    Args:
        content: The merged content.
        files: Name and content of each file, bases included, without `base:`; later ones override earlier ones.
    """

    content: Config = field(default_factory=dict)
    files: tuple[tuple[str, Config], ...] = ()

    def origin(self, path: str) -> str:
        """The file that sets a key such as `model.loss.alpha`, or the nearest key above it; empty if none does.

        Args:
            path: The key as users write it, without `init_args`.
        """
        keys = path.split(".")
        depths = [(_depth(content, keys), name) for name, content in self.files]
        deepest = max((depth for depth, _ in depths), default=0)
        return next((name for depth, name in reversed(depths) if depth == deepest > 0), "")


def load(path: str | Path) -> Config:
    """Loads a configuration file on top of its `base:` files.

    `base:` names one file or a list, relative to the file that contains it. Later files override earlier ones, and the
    file itself overrides its bases. `${config_dir}` in a value stands for the folder of the file that contains it.

    Args:
        path: YAML file; `distillkit:NAME` for one that comes with distillkit, `pkg:PACKAGE/FILE` for a file in an
            installed package.

    Raises:
        ConfigError: If a file is missing, is not a valid YAML mapping, or is its own base.
    """
    return _load(path).content


def load_all(paths: Sequence[str]) -> MergedConfig:
    """Loads several configuration files as one; later files override earlier ones.

    Raises:
        ConfigError: If a file is missing, is not a valid YAML mapping, or is its own base.
    """
    return merge_files([_load(path) for path in paths])


def require_mapping(config: MergedConfig, key: str) -> None:
    """Refuses a top-level key, such as `model`, that has neither settings nor, as a text, the path of a file with them.

    Raises:
        ConfigError: If it has another value.
    """
    value = config.content.get(key, {})
    if not isinstance(value, dict | str):
        raise ConfigError(
            f"{config.origin(key)}: {key} must be a mapping of settings, got {value!r}. Leave it out to set none."
        )


def merge_bases(config: Config, path: str | Path) -> MergedConfig:
    """Merges a configuration on top of the files that its `base:` key names.

    Args:
        config: Content of the file, or of one of its sections.
        path: File that contains it; bases are relative to its folder.

    Raises:
        ConfigError: If a base is missing, is not a valid YAML mapping, or is its own base.
    """
    return _with_bases(config, path, ())


def _load(path: str | Path, chain: tuple[Path, ...] = ()) -> MergedConfig:
    """A file on top of its bases; `chain` holds the files whose `base:` led to it, the outermost first."""
    return _with_bases(_read(path, chain), path, chain)


def _read(path: str | Path, chain: tuple[Path, ...]) -> Config:
    """The content of one file, without its bases."""
    path = locate(path)
    if "\0" in str(path) or not _is_encodable(str(path)):
        raise ConfigError(f"Config file {path} can't exist: no file has such a name. Correct the path.")
    try:
        if path.resolve() in chain:
            raise ConfigError(f"Config file {path} is its own base: {' -> '.join(str(file) for file in chain)}.")
        is_stream = path.exists() and not path.is_file() and not path.is_dir()  # /dev/stdin, or a shell's <(command)
        text = path.read_text(encoding="utf-8-sig")
        config = yaml_loader.parse(text, _folder(path))
    except FileNotFoundError as error:
        origin = f", the base of {chain[-1]}," if chain else ""
        raise ConfigError(f"Config file {path}{origin} does not exist. Check the path.") from error
    except OSError as error:
        raise ConfigError(f"Config file {path} can't be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"Config file {path} is not UTF-8 text ({error.reason}). Save it as UTF-8.") from error
    except ValueError as error:
        raise ConfigError(f"Config file {path} is not valid YAML: {error}.") from error
    if is_stream and not text:
        raise ConfigError(
            f"Config file {path} is empty. A stream is read once, by one process: save it as a file to run on several "
            "devices."
        )
    config = {} if config is None else config
    if not isinstance(config, dict):
        raise ConfigError(f"Config file {path} must be a YAML mapping, got {type(config).__name__}.")
    nested: Config = {}
    for key, value in config.items():
        if not isinstance(key, str):
            raise ConfigError(f"Config file {path} has the key {key!r}, which is no text. Write the name of a setting.")
        for name in reversed(key.split(".")[1:]):  # `trainer.max_epochs: 3`
            value = {name: value}
        nested = merge(nested, {key.partition(".")[0]: value})
    return nested


def _is_encodable(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def _with_bases(config: Config, path: str | Path, chain: tuple[Path, ...]) -> MergedConfig:
    file = locate(path)
    bases = config.get("base", [])
    bases = bases if isinstance(bases, list) else [bases]
    if not all(isinstance(base, str) and base for base in bases):
        raise ConfigError(f"{path}: base must name a config file, or list several, got {config['base']!r}.")
    merged = [_load(_base_path(base, path), (*chain, file.resolve())) for base in bases]
    content = {key: value for key, value in config.items() if key != "base"}
    return merge_files([*merged, MergedConfig(content, ((str(path), content),))])


def _base_path(base: str, path: str | Path) -> str:
    """The path of a base, which starts at the folder of the file that names it."""
    text = str(path)
    if packaged.is_address(base):
        return base
    if text.startswith(packaged.PREFIX):
        return packaged.base_of(base, text)
    return os.path.normpath(_parent(locate(path)) / base)


def _folder(path: Path) -> Path:
    """The absolute folder of a file; the current one for a stream."""
    return path.resolve().parent if path.is_file() else Path.cwd()


def _parent(path: Path) -> Path:
    """The folder of a file as the user named it; the current one for a stream."""
    return path.parent if path.is_file() else Path()


SOURCES = ("train", "val", "test")
"""Keys of `data` whose value is a source of prompts, or its path alone."""


def as_source(value: object) -> object:
    """The settings of a source that is named by its path, or by several, alone; any other value as it is."""
    return {"path": value} if isinstance(value, str | list) else value


def merge(below: Config, above: Config) -> Config:
    """Merges `above` over `below`, key by key. A part with a different `class_path` is replaced as a whole."""
    if "class_path" in above and above["class_path"] != below.get("class_path"):
        return above
    merged = dict(below)
    for key, value in above.items():
        base = merged.get(key)
        if isinstance(base, dict) and isinstance(value, str) and value == base.get("class_path"):
            value = base  # the same part, by its name alone
        if isinstance(base, str) and isinstance(value, dict) and "init_args" in value and "class_path" not in value:
            base = {"class_path": base}
        elif key in SOURCES and isinstance(value, dict) and not value.keys() & {"class_path", "init_args", "path"}:
            base = as_source(base)
        merged[key] = merge(base, value) if isinstance(base, dict) and isinstance(value, dict) else value
    return merged


def merge_files(configs: Sequence[MergedConfig]) -> MergedConfig:
    """Merges several configurations; later ones override earlier ones."""
    merged = MergedConfig()
    for config in configs:
        merged = MergedConfig(merge(merged.content, config.content), (*merged.files, *config.files))
    return merged


def _depth(config: object, keys: Sequence[str]) -> int:
    """The number of `keys`, from the first, that lead into a configuration."""
    if isinstance(config, list):
        return max((_depth(item, keys) for item in config), default=0)
    if not isinstance(config, dict) or not keys:
        return 0
    if keys[0] in config:
        return 1 + _depth(config[keys[0]], keys[1:])
    return _depth(config.get("init_args"), keys)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits command-line arguments into config files (`--config X`, `--config=X`, `-c X`) and the rest.

    The files of `--method NAME` come first, so that they lie below the user's own.

    Raises:
        ConfigError: If a value is missing, there is no such method, or the files leave no effect to it.
    """
    files, chosen, rest = [], [], []
    items = iter(arguments)
    for argument in items:
        flag, separator, value = argument.partition("=")
        if flag.startswith("-c"):
            flag, separator, value = "-c", flag[2:] or separator, argument.removeprefix("-c").removeprefix("=")
        if flag not in ("--config", "-c", "--method"):
            rest.append(argument)
            continue
        if not separator:
            value = next(items, "")
        if not value:
            raise ConfigError(f"{flag} needs {_VALUE_OF.get(flag, 'the path of a config file')} as its value.")
        if flag == "--method":
            chosen.append(methods.find(value))
        else:
            files.append(value)
    for method in chosen:
        _require_effect(method, files)
    return [*(method.address for method in chosen), *files], rest


def _require_effect(method: Method, paths: Sequence[str]) -> None:
    """Refuses files that name other parts than the method below them, so that the run would not be that method."""
    above, below = load_all(paths), load(method.address)
    names = {
        key: tuple(methods.class_name(_section(content, "model").get(key)) for content in (below, above.content))
        for key in ("loss", "curator")
    }
    set_by_method = [key for key, (name, _) in names.items() if name]
    differing = [key for key in set_by_method if names[key][1] not in ("", names[key][0])]
    if "loss" not in differing and not (differing and all(names[key][1] for key in set_by_method)):
        return
    key = f"model.{differing[0]}"
    raise ConfigError(
        f"--method {method.name} is below your files, and {above.origin(key)} sets {key} to {names[differing[0]][1]}, "
        f"so the run would not be {method.name}. In its stead, add `--config {method.address}` after the other files, "
        f"which puts the method on top; or remove {' and '.join(f'model.{name}' for name in differing)} from the files."
    )


def _section(config: Config, key: str) -> Config:
    """The settings below a key; none if it has no mapping."""
    value = config.get(key)
    return value if isinstance(value, dict) else {}


_VALUE_OF = {"--method": "the name of a method, see `distillkit methods`,"}
