"""Registry of installed parts: lists entry points, and resolves names to classes.

This is the only module that reads entry points, and it refers to no specific part. Listing reads metadata and source
code; it imports no part.
"""

import ast
import difflib
import functools
import importlib
import inspect
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from distillkit.errors import PluginError

__all__ = [
    "KINDS",
    "Entry",
    "PluginWarning",
    "available",
    "entries",
    "get",
    "load_all",
]
KINDS: dict[str, str] = {
    "loss": "distillkit.losses",
    "curator": "distillkit.curators",
    "schedule": "distillkit.schedules",
    "generator": "distillkit.generators",
    "teacher": "distillkit.teachers",
    "verifier": "distillkit.verifiers",
    "source": "distillkit.sources",
    "filter": "distillkit.filters",
}
"""Each kind of part and its entry-point group."""

_INTERFACES = {"source": "PromptSource", "filter": "ResponseFilter"}  # otherwise the kind, capitalised

NO_SOURCE = "(source not found)"
MAX_REEXPORTS = 3
_warned: set["Entry"] = set()


class PluginWarning(UserWarning):
    """An installed part was skipped because it can't be used."""


@dataclass(frozen=True)
class Entry:
    """One installed part, as described by the metadata of its distribution.

    Args:
        name: Class name that users write in configurations.
        kind: A key of `KINDS`.
        target: Import path of the class, as `module:Class`.
        distribution: Name of the distribution that contains the class; empty for a class named by its full path.
        version: Version of that distribution.
    """

    name: str
    kind: str
    target: str
    distribution: str = ""
    version: str = ""

    @property
    def origin(self) -> str:
        """Distribution, version and target, for messages."""
        return f"{self.distribution} {self.version} ({self.target})" if self.distribution else self.target


def entries(kind: str | None = None) -> list[Entry]:
    """Lists every installed part of `kind`, or of all kinds. Parts that share a name are all listed.

    Args:
        kind: A key of `KINDS`; None for all kinds.

    Raises:
        PluginError: If the kind does not exist.
    """
    if kind is not None and kind not in KINDS:
        near = _near(kind, KINDS)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"The kinds are {', '.join(KINDS)}."
        raise PluginError(f"There is no kind of part named {kind!r}. {hint}")
    # entry_points() lists each distribution once, by its normalised name, even if sys.path contains it several times.
    points = metadata.entry_points()
    groups = {name: KINDS[name] for name in ([kind] if kind else KINDS)}
    distribution = functools.cache(_distribution)  # points of one share an object, whose metadata is slow to read
    installed = {
        Entry(point.name, name, point.value, *distribution(point.dist))
        for name, group in groups.items()
        for point in points.select(group=group)
    }
    order = list(KINDS)
    return sorted(installed, key=lambda entry: (order.index(entry.kind), entry.name, entry.distribution, entry.target))


def available(kind: str) -> tuple[str, ...]:
    """Lists the names of the installed parts of `kind`, sorted.

    Raises:
        PluginError: If the kind does not exist.
    """
    return tuple(sorted({entry.name for entry in entries(kind)}))


def find(name: str) -> list[str]:
    """Returns the kinds that have a part with this name."""
    kinds = {entry.kind for entry in entries() if entry.name == name}
    return [kind for kind in KINDS if kind in kinds]


def kind_of(part: type) -> str | None:
    """The kind whose interface a class implements, or is; None if it is no part."""
    return next((kind for kind in KINDS if issubclass(part, interface_of(kind))), None)


def interface_of(kind: str) -> type:
    """The class in `distillkit.interfaces` that every part of a kind subclasses."""
    from distillkit import interfaces  # imported late: it imports torch, which listing must not do

    interface: type = vars(interfaces)[_INTERFACES.get(kind, kind.capitalize())]
    return interface


def get(kind: str, name: str) -> type:
    """Imports and returns the class of one part; no other part is imported.

    Args:
        kind: A key of `KINDS`.
        name: Class name of an installed part, or the full path `package.module.Class`.

    Raises:
        PluginError: If the kind or name is unknown, if several parts have the name, if the import fails, or if the
            class is not a subclass of the kind's interface.
    """
    matches = [entry for entry in entries(kind) if entry.name == name]
    if len(matches) > 1:
        origins = " and ".join(entry.origin for entry in matches)
        raise PluginError(
            f"{len(matches)} parts of kind {kind} are named {name!r}, from {origins}. "
            "Uninstall all but one, or write the full path of the class."
        )
    if matches:
        return _load(matches[0])
    module, _, attribute = name.rpartition(".")
    if module:
        return _load(Entry(name, kind, f"{module}:{attribute}"))
    raise PluginError(_unknown(kind, name))


def load_all(kind: str) -> dict[str, type]:
    """Imports every usable part of `kind`, by name. An unusable part is skipped, with one warning per process.

    Raises:
        PluginError: If the kind does not exist.
    """
    parts = {}
    for entry in entries(kind):
        try:
            parts[entry.name] = get(kind, entry.name)
        except PluginError as error:
            if entry not in _warned:
                _warned.update(namesake for namesake in entries(kind) if namesake.name == entry.name)
                warnings.warn(f"Skipped: {error}", PluginWarning, stacklevel=2)
    return parts


def summary(entry: Entry) -> str:
    """Reads the first line of the class's docstring from source code; imports nothing, not even parent packages.

    Returns:
        The line; empty if the class has no docstring, `NO_SOURCE` if its source is not available.
    """
    module, _, name = entry.target.partition(":")
    for _ in range(1 + MAX_REEXPORTS):
        if not module:
            break
        statements, package = _statements(module)
        for statement in statements:
            if isinstance(statement, ast.ClassDef) and statement.name == name:
                return next(iter((ast.get_docstring(statement) or "").splitlines()), "")
        module, name = _imported_from(statements, package, name)
    return NO_SOURCE


def _distribution(distribution: metadata.Distribution | None) -> tuple[str, str]:
    """Name and version of a distribution."""
    assert distribution is not None  # entry_points() sets it
    return distribution.name, distribution.version


def _near(word: str, names: Iterable[str]) -> list[str]:
    """Up to three of `names` that resemble `word`, ignoring case."""
    folded = {name.casefold(): name for name in names}
    word = word.casefold()
    near = difflib.get_close_matches(word, folded, n=3)
    near += [name for name in folded if word and name not in near and (word in name or name in word)]
    return [folded[name] for name in near[:3]]


def _unknown(kind: str, name: str) -> str:
    near = _near(name, available(kind))
    other_kinds = find(name)
    if other_kinds:
        hint = f" There is a {' and a '.join(other_kinds)} with that name."
    else:
        hint = f" Similar names: {', '.join(near)}." if near else ""
    return f"No installed {kind} is named {name!r}.{hint} Run `distillkit plugins {kind}` to list them all."


def _load(entry: Entry) -> type:
    try:
        part = metadata.EntryPoint(entry.name, entry.target, KINDS[entry.kind]).load()
    except (Exception, SystemExit) as error:  # third-party code may raise anything at import
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise PluginError(
            f"The {entry.kind} {entry.name!r} of {entry.origin} can't be imported: {reason}{_location(error)}."
        ) from error
    interface = interface_of(entry.kind)
    if not (isinstance(part, type) and issubclass(part, interface)):
        raise PluginError(
            f"The {entry.kind} {entry.name!r} of {entry.origin} is not a subclass of {_contract(interface)}."
        )
    return part


def _location(error: BaseException) -> str:
    """File and line at which a part's import failed: the innermost frame outside the import system."""
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).is_file():
        return f" at {error.filename}:{error.lineno}"
    import_files = (__file__, importlib.__file__, metadata.__file__)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in import_files and not frame.filename.startswith("<frozen ")
    ]
    return f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _contract(interface: type) -> str:
    """The requirements of an interface: the first line of its docstring and its abstract methods."""
    methods = []
    for name in sorted(getattr(interface, "__abstractmethods__", ())):
        method = getattr(interface, name)
        if callable(method):
            methods.append(f"{name}({', '.join(list(inspect.signature(method).parameters)[1:])})")
        else:
            methods.append(name)
    purpose = (inspect.getdoc(interface) or "").splitlines()[0]
    return f'{interface.__module__}.{interface.__name__} ("{purpose}"), which requires {", ".join(methods)}'


def _statements(module: str) -> tuple[list[ast.stmt], str]:
    """The top-level statements of a module's source, empty if it is not available, and the module's package."""
    path: Sequence[str] | None = None
    loader: object = None
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        if end > 1 and path is None:  # the parent is a plain module: None would mean sys.path to the finders
            return [], ""
        path, loader = _locate(".".join(parts[:end]), path)
    get_source = getattr(loader, "get_source", None)
    package = module if path is not None else ".".join(parts[:-1])
    try:
        source = get_source(module) if get_source else None
        with warnings.catch_warnings(action="ignore"):  # SyntaxWarnings about the part's source
            return list(_top_level(ast.parse(source or "").body)), package
    except (ImportError, SyntaxError, ValueError):  # unreadable, not Python, not text
        return [], package


def _locate(name: str, path: Sequence[str] | None) -> tuple[Sequence[str] | None, object]:
    """Finds a module without executing anything: its submodule search path, if it is a package, and its loader.

    importlib.util.find_spec would import the parents, so this calls the finders directly.

    Args:
        name: Full name of the module.
        path: Submodule search path of its parent package; None for a top-level module.
    """
    for finder in sys.meta_path:
        find_spec = getattr(finder, "find_spec", None)
        try:
            spec = find_spec(name, path) if find_spec else None
        except KeyError:
            # A namespace package inside a package: its finder looks up the parent in sys.modules, where it is missing.
            folders = [Path(parent, name.rpartition(".")[2]) for parent in path or ()]
            return [str(folder) for folder in folders if folder.is_dir()], None
        if spec is not None:
            return spec.submodule_search_locations, spec.loader
    return None, None


def _top_level(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, including those inside `if` and `try` blocks."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try):
            yield from _top_level(statement.body)
            yield from _top_level(statement.orelse)
            for handler in getattr(statement, "handlers", ()):
                yield from _top_level(handler.body)


def _imported_from(statements: Iterable[ast.stmt], package: str, name: str) -> tuple[str, str]:
    """The module and original name that a `from … import` binds `name` to; both empty if there is none."""
    for statement in statements:
        if isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    parent = package.rsplit(".", statement.level - 1)[0] if statement.level else ""
                    return ".".join(filter(None, (parent, statement.module))), alias.name
    return "", ""
