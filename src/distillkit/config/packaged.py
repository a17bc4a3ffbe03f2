"""Configuration files of installed packages, by their addresses.

`distillkit:NAME` comes with distillkit, such as `distillkit:methods/gkd.yaml`; `pkg:PACKAGE/FILE` with another package.
"""

import difflib
import importlib.util
import posixpath
from pathlib import Path

from distillkit.errors import ConfigError

PREFIX = "distillkit:"
PACKAGE = "pkg:"


def folder() -> Path:
    """The folder of distillkit's files: in the installed package, or `configs/` of the source tree that is in use."""
    package = Path(__file__).parents[1]
    source_tree = package.parents[1] / "configs"
    return source_tree if package.parent.name == "src" and source_tree.is_dir() else package / "configs"


def names() -> list[str]:
    """Lists distillkit's files by name, such as `base.yaml` and `methods/gkd.yaml`."""
    root = folder()
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.yaml"))


def package_folder(package: str) -> Path | None:
    """The folder of an installed package, which is not imported; None if there is none."""
    spec = importlib.util.find_spec(package) if package.isidentifier() and not package.startswith("__") else None
    return Path(spec.submodule_search_locations[0]) if spec is not None and spec.submodule_search_locations else None


def is_address(path: str) -> bool:
    """True for the address of a packaged file, False for the path of any other."""
    return path.startswith((PREFIX, PACKAGE))


def base_of(base: str, address: str) -> str:
    """The address of a base, which `base:` of one of distillkit's files names relative to that file."""
    return PREFIX + posixpath.normpath(posixpath.join(posixpath.dirname(address.removeprefix(PREFIX)), base))


def locate(path: str | Path) -> Path:
    """The file that a path or an address names.

    Args:
        path: The path of a file, or the address of a packaged one.

    Raises:
        ConfigError: If the package is not installed, or if distillkit has no such file.
    """
    text = str(path)
    if text.startswith(PREFIX):
        return folder() / _existing(text)
    if not text.startswith(PACKAGE):
        return Path(path)
    package, _, file = text.removeprefix(PACKAGE).partition("/")
    root = package_folder(package)
    if root is None:
        raise ConfigError(
            f"Config file {text} is in the package {package!r}, which is not installed. {PACKAGE}PACKAGE/FILE names a "
            "file in an installed package."
        )
    return root / file


def _existing(address: str) -> str:
    """The name of one of distillkit's files, which exists."""
    name, available = address.removeprefix(PREFIX), names()
    if name in available:
        return name
    near = [file for file in available if Path(file).stem == Path(name).stem]
    near += [file for file in difflib.get_close_matches(name, available, n=3) if file not in near]
    hint = f" Did you mean {' or '.join(PREFIX + file for file in near)}?" if near else ""
    raise ConfigError(
        f"Config file {address} does not come with distillkit.{hint} These do: {', '.join(available) or 'none'}."
    )
