"""`distillkit new-plugin NAME --kind KIND`: creates a package for a part of the user's own.

The package installs and passes its tests unchanged. A template is the folder of a complete package, with placeholders
such as `my_plugin` for the names. A kind of part has a template if `templates` contains a folder of that name.
"""

import argparse
import ast
import keyword
import re
from collections.abc import Iterator, Mapping
from importlib import metadata, util
from pathlib import Path

from distillkit.errors import PluginError
from distillkit.registry import KINDS, entries

TEMPLATES = Path(__file__).with_name("templates")
SHARED = "shared"
"""Folder with the files that every package has."""

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")  # PEP 508
_SEPARATORS = re.compile(r"[-_.]+")


def run(argv: list[str]) -> int:
    """Creates the package and prints the next steps.

    Args:
        argv: Command-line arguments after `distillkit new-plugin`.

    Returns:
        The exit status, 0.

    Raises:
        PluginError: If the name is invalid or already in use, or if the folder exists.
    """
    arguments = _parser().parse_args(argv)
    folder = arguments.into / arguments.name
    words = _substitutions(arguments.name, arguments.kind)
    texts = dict(_template_files(arguments.kind))
    _require_valid(arguments.name, words, texts)
    _require_unused(arguments.name, words, arguments.kind)
    _write(folder, texts, words)
    part = words["MyPlugin"]
    print(
        f"Created {folder}, a package with the {arguments.kind} {part}. "
        f"Edit {_module_file(folder, words)} and its tests."
    )
    print(f'Run `pip install -e "{folder}[test]"` to use {part} by name, and `pytest {folder}` to test it.')
    return 0


def kinds() -> tuple[str, ...]:
    """Lists the kinds of part that have a template."""
    return tuple(kind for kind in KINDS if (TEMPLATES / kind).is_dir())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distillkit new-plugin",
        description="Creates a package for your own part. It installs and passes its tests unchanged.",
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", help="name of the package, such as distillkit-hellinger")
    parser.add_argument(
        "--kind", required=True, choices=kinds(), metavar="KIND", help=f"kind of the part: {', '.join(kinds())}"
    )
    parser.add_argument(
        "--into", type=Path, default=Path(), metavar="DIR", help="folder in which to create the package's folder"
    )
    return parser


def _substitutions(name: str, kind: str) -> dict[str, str]:
    """The replacement of each placeholder in the templates."""
    module = _SEPARATORS.sub("_", name).lower()
    parts = _SEPARATORS.split(name.removeprefix("distillkit-"))
    return {
        "my-plugin": name,
        "my_plugin": module,
        "my_method": module.removeprefix("distillkit_"),
        "MyPlugin": "".join(part[:1].upper() + part[1:] for part in parts),
        "my_kind": kind,
        "my_group": KINDS[kind],
    }


def _template_files(kind: str) -> Iterator[tuple[str, str]]:
    """Path in the package and content of each file of a template."""
    for root in (TEMPLATES / SHARED, TEMPLATES / kind):
        for path in sorted(root.rglob("*")):
            relative = path.relative_to(root)
            is_cache = any(part.startswith((".", "__pycache__")) for part in relative.parts)
            if path.is_file() and not is_cache:
                yield relative.as_posix(), path.read_text(encoding="utf-8")


def _substitute(text: str, words: Mapping[str, str]) -> str:
    return re.sub("|".join(words), lambda match: words[match[0]], text)


def _module_file(folder: Path, words: Mapping[str, str]) -> Path:
    return folder / words["my_plugin"] / f"{words['my_kind']}.py"


def _require_valid(name: str, words: Mapping[str, str], texts: Mapping[str, str]) -> None:
    """Refuses a name that is not valid for a package, a module and a class."""
    module, part = words["my_plugin"], words["MyPlugin"]
    if not _NAME.fullmatch(name):
        raise PluginError(
            f"NAME may contain letters, digits, '-', '_' and '.', and must start and end with a letter or digit, "
            f"got {name!r}."
        )
    for identifier, role in ((module, "module"), (part, "class")):
        if not identifier.isidentifier() or keyword.iskeyword(identifier):
            raise PluginError(
                f"NAME {name!r} would name the {role} {identifier!r}, which Python does not allow. Use another NAME."
            )
    if module in {path.partition("/")[0] for path in texts}:
        raise PluginError(
            f"NAME {name!r} would name the module {module!r}, like a folder of the package. Use another NAME."
        )
    if part in _imported_names(texts):
        raise PluginError(f"NAME {name!r} would name the class {part!r}, which its module imports. Use another NAME.")


def _imported_names(texts: Mapping[str, str]) -> set[str]:
    """The names that the modules of a template import."""
    modules = [ast.parse(text) for path, text in texts.items() if path.endswith(".py")]
    statements = [statement for module in modules for statement in module.body]
    imports = [statement for statement in statements if isinstance(statement, ast.Import | ast.ImportFrom)]
    return {alias.asname or alias.name for statement in imports for alias in statement.names} - {"MyPlugin"}


def _require_unused(name: str, words: Mapping[str, str], kind: str) -> None:
    """Refuses a name that a part, a distribution or a module in this environment already has."""
    module, part = words["my_plugin"], words["MyPlugin"]
    for entry in entries(kind):
        if entry.name == part:
            raise PluginError(
                f"NAME {name!r} would name the {kind} {part!r}, which {entry.origin} already provides. Two parts with "
                "the same name can't be used. Use another NAME."
            )
    normal = module.replace("_", "-")
    if any(_SEPARATORS.sub("-", dist.name or "").lower() == normal for dist in metadata.distributions()):
        raise PluginError(
            f"A distribution named {name!r} is installed, and the package would replace it. Use another NAME."
        )
    if util.find_spec(module) is not None:
        raise PluginError(
            f"NAME {name!r} would name the module {module!r}, which is already installed. Use another NAME."
        )


def _write(folder: Path, texts: Mapping[str, str], words: Mapping[str, str]) -> None:
    if folder.exists():
        raise PluginError(f"{folder} already exists and is not overwritten. Use another NAME or another --into.")
    try:
        for path, text in texts.items():
            file = folder / _substitute(path, words)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(_substitute(text, words), encoding="utf-8")
    except OSError as error:
        raise PluginError(f"{error.filename} can't be written ({error.strerror}). Use another --into.") from error
