"""Entry points to classes: what is installed, what it says of itself, and the class behind a name.

Nothing else knows of entry points, and nothing here knows of any part. Listing reads metadata and source: it imports
no part.
"""

import ast
import difflib
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

KINDS: dict[str, str] = {
    "loss": "distillkit.losses",
    "curator": "distillkit.curators",
    "schedule": "distillkit.schedules",
    "generator": "distillkit.generators",
    "teacher": "distillkit.teachers",
    "verifier": "distillkit.verifiers",
}
"""Each kind of part and the entry-point group that brings its parts."""

NO_SOURCE = "(source not found)"
MAX_REEXPORTS = 3
_warned: set["Entry"] = set()


class PluginWarning(UserWarning):
    """An installed part is skipped because it can't be used."""


@dataclass(frozen=True)
class Entry:
    """One installed part, as its distribution's metadata gives it.

    Args:
        name: The class name that users write.
        kind: A key of `KINDS`.
        target: Where the class is, as `module:Class`.
        distribution: Name of the distribution that brings it; empty for a part that was asked for by its full path.
        version: That distribution's version.
    """

    name: str
    kind: str
    target: str
    distribution: str = ""
    version: str = ""

    @property
    def origin(self) -> str:
        """Distribution and version with the target, for messages."""
        return f"{self.distribution} {self.version} ({self.target})" if self.distribution else self.target


def entries(kind: str | None = None) -> list[Entry]:
    """Every installed part of `kind`, or of all kinds; one of two parts that share a name does not hide the other.

    Args:
        kind: A key of `KINDS`; None for all of them.

    Raises:
        PluginError: If there is no such kind.
    """
    if kind is not None and kind not in KINDS:
        near = _near(kind, KINDS)
        meant = f"did you mean {' or '.join(near)}?" if near else f"the kinds are {', '.join(KINDS)}."
        raise PluginError(f"There is no kind of part named {kind!r}; {meant}")
    # entry_points() takes each distribution once, by its normalised name, however often it is on sys.path.
    points = metadata.entry_points()
    found = {_entry(point, each) for each in ([kind] if kind else KINDS) for point in points.select(group=KINDS[each])}
    order = list(KINDS)
    return sorted(found, key=lambda entry: (order.index(entry.kind), entry.name, entry.distribution, entry.target))


def available(kind: str) -> tuple[str, ...]:
    """Names of the installed parts of `kind`, sorted.

    Raises:
        PluginError: If there is no such kind.
    """
    return tuple(sorted({entry.name for entry in entries(kind)}))


def find(name: str) -> list[str]:
    """The kinds that have a part of this name."""
    found = {entry.kind for entry in entries() if entry.name == name}
    return [kind for kind in KINDS if kind in found]


def get(kind: str, name: str) -> type:
    """The class of the part `name`; no other part is imported.

    Args:
        kind: A key of `KINDS`.
        name: Name of an installed part, or the full path of a class, `package.module.Class`.

    Raises:
        PluginError: If the kind or the name is unknown, if two parts have the name, if the part can't be imported, or
            if it is not a subclass of the kind's interface.
    """
    found = [entry for entry in entries(kind) if entry.name == name]
    if len(found) > 1:
        origins = " and ".join(entry.origin for entry in found)
        raise PluginError(
            f"{len(found)} parts of kind {kind} are named {name!r}, from {origins}: "
            "uninstall all but one, or write the full path of the one that is meant."
        )
    if found:
        return _load(found[0])
    module, _, attribute = name.rpartition(".")
    if module:
        return _load(Entry(name, kind, f"{module}:{attribute}"))
    raise PluginError(_unknown(kind, name))


def load_all(kind: str) -> dict[str, type]:
    """Every usable part of `kind` by name. One that can't be used is skipped with one warning in this process.

    Raises:
        PluginError: If there is no such kind.
    """
    parts = {}
    for entry in entries(kind):
        try:
            parts[entry.name] = get(kind, entry.name)
        except PluginError as error:
            if entry not in _warned:
                _warned.update(other for other in entries(kind) if other.name == entry.name)
                warnings.warn(f"Skipped: {error}", PluginWarning, stacklevel=2)
    return parts


def summary(entry: Entry) -> str:
    """First line of the class's docstring, read from its source: nothing is imported, no parent package either.

    Returns:
        The line; empty if the class has no docstring, `NO_SOURCE` if there is no source to read it from.
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


def _entry(point: metadata.EntryPoint, kind: str) -> Entry:
    assert point.dist is not None  # entry_points() makes each of them from a distribution
    return Entry(point.name, kind, point.value, point.dist.name, point.dist.version)


def _near(word: str, names: Iterable[str]) -> list[str]:
    """Up to three of `names` that `word` may have meant, whatever their case."""
    folded = {name.casefold(): name for name in names}
    word = word.casefold()
    near = difflib.get_close_matches(word, folded, n=3)
    near += [name for name in folded if word and name not in near and (word in name or name in word)]
    return [folded[name] for name in near[:3]]


def _unknown(kind: str, name: str) -> str:
    near = _near(name, available(kind))
    elsewhere = find(name)
    if elsewhere:
        hint = f" (there is a {' and a '.join(elsewhere)} of that name)"
    else:
        hint = f" (near it: {', '.join(near)})" if near else ""
    return f"No installed {kind} is named {name!r}{hint}: `distillkit plugins {kind}` lists them all."


def _load(entry: Entry) -> type:
    try:
        part = metadata.EntryPoint(entry.name, entry.target, KINDS[entry.kind]).load()
    except (Exception, SystemExit) as error:  # a stranger's module may raise anything while it is imported
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise PluginError(
            f"The {entry.kind} {entry.name!r} of {entry.origin} can't be imported: {reason}{_place(error)}."
        ) from error
    from distillkit import interfaces  # here, because it imports torch and listing must not

    interface: type = getattr(interfaces, entry.kind.capitalize())
    if not (isinstance(part, type) and issubclass(part, interface)):
        raise PluginError(
            f"The {entry.kind} {entry.name!r} of {entry.origin} is not a subclass of {_contract(interface)}."
        )
    return part


def _place(error: BaseException) -> str:
    """Where a part's import failed: the innermost line that is not the import system's own."""
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).is_file():
        return f" at {error.filename}:{error.lineno}"
    own = (__file__, importlib.__file__, metadata.__file__)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame for frame in frames if frame.filename not in own and not frame.filename.startswith("<frozen ")]
    return f" at {lines[-1].filename}:{lines[-1].lineno}" if lines else ""


def _contract(interface: type) -> str:
    """What a part must be, in the interface's own words: its first line and the methods to write."""
    methods = []
    for name in sorted(getattr(interface, "__abstractmethods__", ())):
        method = getattr(interface, name)
        if callable(method):
            methods.append(f"{name}({', '.join(list(inspect.signature(method).parameters)[1:])})")
        else:
            methods.append(name)
    said = (inspect.getdoc(interface) or "").splitlines()[0]
    return f'{interface.__module__}.{interface.__name__} ("{said}"), which asks for {", ".join(methods)}'


def _statements(module: str) -> tuple[list[ast.stmt], str]:
    """The top-level statements of a module's source, none if it is not found, and the package it is in."""
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
        with warnings.catch_warnings(action="ignore"):  # the source's own, about its syntax
            return list(_top_level(ast.parse(source or "").body)), package
    except (ImportError, SyntaxError, ValueError):  # unreadable, not Python, not text
        return [], package


def _locate(name: str, path: Sequence[str] | None) -> tuple[Sequence[str] | None, object]:
    """Where a package's submodules are, and the loader of a module. Executes nothing.

    importlib.util.find_spec would import the parents, so the finders are asked one by one.

    Args:
        name: Full name of the module.
        path: Where its parent's submodules are; None at the top level.
    """
    for finder in sys.meta_path:
        find_spec = getattr(finder, "find_spec", None)
        try:
            spec = find_spec(name, path) if find_spec else None
        except KeyError:
            # A package without __init__ inside another: its finder looks for the parent in sys.modules, where it isn't.
            folders = [Path(parent, name.rpartition(".")[2]) for parent in path or ()]
            return [str(folder) for folder in folders if folder.is_dir()], None
        if spec is not None:
            return spec.submodule_search_locations, spec.loader
    return None, None


def _top_level(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module, with those inside of its `if` and `try` blocks."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try):
            yield from _top_level(statement.body)
            yield from _top_level(statement.orelse)
            for handler in getattr(statement, "handlers", ()):
                yield from _top_level(handler.body)


def _imported_from(statements: Iterable[ast.stmt], package: str, name: str) -> tuple[str, str]:
    """Module and name that a `from … import` takes `name` from; both empty if there is none."""
    for statement in statements:
        if isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    above = package.rsplit(".", statement.level - 1)[0] if statement.level else ""
                    return ".".join(filter(None, (above, statement.module))), alias.name
    return "", ""
