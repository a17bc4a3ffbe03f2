"""Configuration files that come with distillkit: `distillkit:NAME` names one, such as `distillkit:methods/gkd.yaml`."""

import difflib
from pathlib import Path

from distillkit.errors import ConfigError

PREFIX = "distillkit:"


def folder() -> Path:
    """The folder of these files: in the installed package, or `configs/` of the source tree that is worked on."""
    package = Path(__file__).parents[1]
    source_tree = package.parents[1] / "configs"
    return source_tree if package.parent.name == "src" and source_tree.is_dir() else package / "configs"


def names() -> list[str]:
    """Lists the files by name, such as `base.yaml` and `methods/gkd.yaml`."""
    root = folder()
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.yaml"))


def locate(address: str) -> Path:
    """Finds a file by its address.

    Args:
        address: `distillkit:NAME`, in which NAME is one of `names()`.

    Raises:
        ConfigError: If there is no such file; the message lists all of them.
    """
    name, available = address.removeprefix(PREFIX), names()
    if name in available:
        return folder() / name
    near = [file for file in available if Path(file).stem == Path(name).stem]
    near += [close for close in difflib.get_close_matches(name, available, n=3) if close not in near]
    hint = f" Did you mean {' or '.join(PREFIX + close for close in near)}?" if near else ""
    raise ConfigError(
        f"Config file {address} does not come with distillkit.{hint} These do: {', '.join(available) or 'none'}."
    )
