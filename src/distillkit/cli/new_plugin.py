"""`distillkit new-plugin NAME --kind KIND`: writes a package with a part of one's own.

It installs and passes its tests as it is. A template is a folder of a whole package, with words of its own in the place
of the names that are asked for. A kind of part has one as soon as `templates` has a folder of its name.
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
"""The folder with the files that every package has."""

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")  # PEP 508
_SEPARATORS = re.compile(r"[-_.]+")


def run(argv: list[str]) -> int:
    """Writes the package and says what to do with it.

    Args:
        argv: The arguments after `distillkit new-plugin`.

    Returns:
        The exit status, 0.

    Raises:
        PluginError: If the name is none that a package and its part can have, is taken, or the folder exists.
    """
    arguments = _parser().parse_args(argv)
    folder = arguments.into / arguments.name
    words = _words(arguments.name, arguments.kind)
    texts = dict(_texts(arguments.kind))
    _require_valid(arguments.name, words, texts)
    _require_free(arguments.name, words, arguments.kind)
    _write(folder, texts, words)
    part = words["MyPlugin"]
    print(f"Wrote {folder}, a package with the {arguments.kind} {part}: edit {_home(folder, words)} and its tests.")
    print(f'pip install -e "{folder}[test]" makes {part} usable by name, and pytest {folder} tests it.')
    return 0


def kinds() -> tuple[str, ...]:
    """The kinds of part that have a template."""
    return tuple(kind for kind in KINDS if (TEMPLATES / kind).is_dir())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distillkit new-plugin",
        description="Writes a package with a part of your own: it installs and passes its tests as it is.",
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", help="name of the package, such as distillkit-hellinger")
    parser.add_argument("--kind", required=True, choices=kinds(), help="what the part is")
    parser.add_argument("--into", type=Path, default=Path(), metavar="DIR", help="where the package's folder is made")
    return parser


def _words(name: str, kind: str) -> dict[str, str]:
    """What stands in a package for each of the templates' own names."""
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


def _texts(kind: str) -> Iterator[tuple[str, str]]:
    """The files of a kind's template, by their paths in the package."""
    for root in (TEMPLATES / SHARED, TEMPLATES / kind):
        for path in sorted(root.rglob("*")):
            own = path.relative_to(root)
            if path.is_file() and not any(part.startswith((".", "__pycache__")) for part in own.parts):  # tools' caches
                yield own.as_posix(), path.read_text(encoding="utf-8")


def _replaced(text: str, words: Mapping[str, str]) -> str:
    return re.sub("|".join(words), lambda match: words[match[0]], text)


def _home(folder: Path, words: Mapping[str, str]) -> Path:
    return folder / words["my_plugin"] / f"{words['my_kind']}.py"


def _require_valid(name: str, words: Mapping[str, str], texts: Mapping[str, str]) -> None:
    """Refuses a name that no package, no module or no class can have."""
    module, part = words["my_plugin"], words["MyPlugin"]
    if not _NAME.fullmatch(name):
        raise PluginError(
            f"NAME must be letters, digits, '-', '_' and '.', with a letter or a digit at both ends, got {name!r}."
        )
    for word, what in ((module, "module"), (part, "class")):
        if not word.isidentifier() or keyword.iskeyword(word):
            raise PluginError(
                f"NAME {name!r} would name the {what} {word!r}, which Python does not allow: use another."
            )
    if module in {path.partition("/")[0] for path in texts}:
        raise PluginError(f"NAME {name!r} would name the module {module!r}, as the package's own folder: use another.")
    if part in _imported(texts):
        raise PluginError(f"NAME {name!r} would name the class {part!r}, which its module imports: use another.")


def _imported(texts: Mapping[str, str]) -> set[str]:
    """The names that the modules of a template import."""
    statements = [each for path, text in texts.items() if path.endswith(".py") for each in ast.parse(text).body]
    found = [each.names for each in statements if isinstance(each, ast.Import | ast.ImportFrom)]
    return {alias.asname or alias.name for names in found for alias in names} - {"MyPlugin"}


def _require_free(name: str, words: Mapping[str, str], kind: str) -> None:
    """Refuses a name that a part, a distribution or a module in this environment has."""
    module, part = words["my_plugin"], words["MyPlugin"]
    for entry in entries(kind):
        if entry.name == part:
            raise PluginError(
                f"NAME {name!r} would name the {kind} {part!r}, which {entry.origin} brings, and of two parts of one "
                "name neither can be used: use another."
            )
    normal = module.replace("_", "-")
    if any(_SEPARATORS.sub("-", own.name or "").lower() == normal for own in metadata.distributions()):
        raise PluginError(f"A distribution named {name!r} is installed, and the package would replace it: use another.")
    if util.find_spec(module) is not None:
        raise PluginError(f"NAME {name!r} would name the module {module!r}, which can be imported here: use another.")


def _write(folder: Path, texts: Mapping[str, str], words: Mapping[str, str]) -> None:
    if folder.exists():
        raise PluginError(f"{folder} exists, and nothing is written over: use another NAME, or another --into.")
    try:
        for path, text in texts.items():
            file = folder / _replaced(path, words)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(_replaced(text, words), encoding="utf-8")
    except OSError as error:
        raise PluginError(f"{error.filename} can't be written ({error.strerror}): use another --into.") from error
