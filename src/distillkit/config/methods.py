"""Methods that can be run: configuration files that come with distillkit and with installed plugins.

A method is described by its own file: the comment on top names it and its paper, the content its loss and its
responses. There is no other list of them.
"""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from distillkit import registry
from distillkit.config import packaged, yaml_loader
from distillkit.errors import ConfigError

FOLDER = "methods/"
_PAPER = re.compile(r"\(([^()]*(?:arXiv|\b(?:19|20)\d\d\b)[^()]*)\)")


@dataclass(frozen=True)
class Method:
    """A method, as its file describes it.

    Args:
        name: Name of the file without its suffix, as for `--method`.
        address: Address of the file, as for `--config` and `base:`.
        summary: First line of the comment on top.
        loss: Class name of the loss.
        responses: The curators that provide the responses, each with its rounds if they are repeated.
    """

    name: str
    address: str
    summary: str
    loss: str
    responses: tuple[str, ...]

    @property
    def paper(self) -> str:
        """Authors and year of the paper, and its arXiv number, as far as the file says them; empty without a paper."""
        match = _PAPER.search(self.summary)
        return match[1] if match is not None else ""

    @property
    def short_paper(self) -> str:
        """First author and year of the paper, or what else the file says first of it."""
        return re.sub(r" et al\.| (?:and|&) .*(?= \d)", "", self.paper.partition(",")[0])

    @property
    def text(self) -> str:
        """Content of the file."""
        return packaged.locate(self.address).read_text(encoding="utf-8")


def methods() -> list[Method]:
    """Lists all methods, sorted by name: those of distillkit and those of installed plugins, which are not imported."""
    read = map(_read, _addresses())
    return sorted((method for method in read if method is not None), key=lambda method: (method.name, method.address))


def find(name: str) -> Method:
    """Finds a method by its name.

    Raises:
        ConfigError: If there is none, or several packages have one.
    """
    read = [_read(address) for address in _addresses() if PurePosixPath(address).stem == name]
    matches = [method for method in read if method is not None]
    if len(matches) == 1:
        return matches[0]
    if matches:
        addresses = " and ".join(method.address for method in matches)
        raise ConfigError(f"The method {name} is in {addresses}. Name one of these files with --config instead.")
    names = [method.name for method in methods()]
    near = difflib.get_close_matches(name.casefold(), names, n=3)
    near += [other for other in names if name and name.casefold() in other and other not in near]
    hint = f" Did you mean {' or '.join(near[:3])}?" if near else ""
    raise ConfigError(f"There is no method named {name!r}.{hint} Run `distillkit methods` to list them all.")


def _addresses() -> list[str]:
    """Addresses of the files that may be methods."""
    return [*(packaged.PREFIX + name for name in packaged.names() if name.startswith(FOLDER)), *_plugin_files()]


def _plugin_files() -> list[str]:
    """Addresses of the YAML files in the top-level packages of installed plugins."""
    packages = {entry.target.partition(".")[0].partition(":")[0] for entry in registry.entries()} - {"distillkit"}
    folders = {package: packaged.package_folder(package) for package in sorted(packages)}
    return [
        f"{packaged.PACKAGE}{package}/{path.name}"
        for package, folder in folders.items()
        if folder is not None
        for path in sorted(folder.glob("*.yaml"))
    ]


def _read(address: str) -> Method | None:
    """Describes a file; None if it is no method, which sets `model.loss` or `model.curator`."""
    path = packaged.locate(address)
    try:
        text = path.read_text(encoding="utf-8")
        model = _model(text, path)
    except (
        OSError,
        ValueError,
    ):  # a damaged file hides no other; a run that names it says what is wrong
        return None
    if not model.keys() & {"loss", "curator"}:
        return None
    summary = text.partition("\n")[0].lstrip("# ").strip() if text.startswith("#") else ""
    return Method(path.stem, address, summary, class_name(model.get("loss")), tuple(_leaves(model.get("curator"))))


def _model(text: str, path: Path) -> dict[str, object]:
    """The section `model` of a file, and below it those of its bases in the same folder."""
    content = yaml_loader.parse(text, path.parent)
    if not isinstance(content, dict):
        return {}
    bases = content.get("base", [])
    model: dict[str, object] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        below = path.with_name(str(base))
        model |= _model(below.read_text(encoding="utf-8"), below) if below.is_file() else {}
    section = content.get("model")
    return model | (section if isinstance(section, dict) else {})


def class_name(part: object) -> str:
    """The short name of the class that a configuration names as a part; empty if it names none.

    Args:
        part: The name alone, or a mapping with `class_path`.
    """
    name = part.get("class_path") if isinstance(part, dict) else part
    return str(name or "").rpartition(".")[2]


def _leaves(curator: object) -> Iterator[str]:
    """The innermost curators of a curator, in the order of the file."""
    settings = (curator.get("init_args") or {}) if isinstance(curator, dict) else {}
    nested = [leaf for value in settings.values() for part in _listed(value) for leaf in _leaves(part)]
    name = class_name(curator) if isinstance(curator, str | dict) else ""
    if nested:
        yield from nested
    elif name.endswith("Curator"):
        rounds = settings.get("rounds")
        yield name.removesuffix("Curator").lower() + (f"/{rounds}" if rounds not in (None, "once") else "")


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]
