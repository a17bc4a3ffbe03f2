"""The words that the code is written in: names are nouns, and docstrings say what a thing is."""

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

import pytest

import distillkit

ROOT = Path(__file__).parent.parent
AREAS = ("src", "plugins", "benchmarks", "tests/helpers")
FILES = sorted(path for area in AREAS for path in (ROOT / area).rglob("*.py"))

REFUSED = {
    "own",
    "found",
    "given",
    "kept",
    "held",
    "told",
    "said",
    "known",
    "others",
    "wanted",
    "asked",
    "place",
    "places",
    "here",
}
"""Pronouns and participles: a name says what a thing is, by the field's word for it."""

RIDDLES = ("What", "Whether", "How", "Those", "Who")
"""First words of docstrings that say no noun."""

LARGEST_SHARE = 0.015


def test_files_of_every_area_are_read():
    for area in AREAS:
        assert any(path.is_relative_to(ROOT / area) for path in FILES), area


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_are_nouns(path):
    refused = sorted({(name.strip("_"), line) for name, line in names(path) if name.strip("_") in REFUSED})
    assert refused == []


def test_docstrings_begin_with_a_noun_or_a_verb():
    firsts = [(docstring.split()[0].strip(",.:"), path) for path in FILES for docstring in docstrings(path)]
    riddles = [(word, str(path.relative_to(ROOT))) for word, path in firsts if word in RIDDLES]
    assert len(firsts) > 1000
    assert len(riddles) / len(firsts) < LARGEST_SHARE, riddles


def test_every_public_method_is_documented_where_it_is_first_defined():
    methods = list(public_methods())
    missing = [
        f"{part.__module__}.{part.__name__}.{method.__name__}"
        for part, method in methods
        if not method.__doc__ and not any(method.__name__ in vars(base) for base in part.__mro__[1:])
    ]
    assert missing == []
    assert len(methods) > 500


def public_methods() -> Iterator[tuple[type, FunctionType]]:
    """The public classes of the package, and the methods and properties that they define."""
    for module in pkgutil.walk_packages(distillkit.__path__, "distillkit."):
        if "__main__" in module.name or ".templates" in module.name:
            continue
        for part in vars(importlib.import_module(module.name)).values():
            if isinstance(part, type) and part.__module__ == module.name and not part.__name__.startswith("_"):
                for name, member in vars(part).items():
                    function = getattr(member, "fget", getattr(member, "func", getattr(member, "__func__", member)))
                    if isinstance(function, FunctionType) and name == function.__name__ and not name.startswith("_"):
                        yield part, function


def names(path: Path) -> Iterator[tuple[str, int]]:
    """Identifiers that a file defines or uses, with their lines."""
    for node in ast.walk(ast.parse(path.read_text())):
        line = getattr(node, "lineno", 0)
        match node:
            case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name):
                yield name, line
            case ast.keyword(arg=str(name)):
                yield name, line
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name, line
            case ast.alias(name=name, asname=alias):
                yield alias or name.rpartition(".")[2], line


def docstrings(path: Path) -> Iterator[str]:
    """The docstrings of a file that are not empty."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring
