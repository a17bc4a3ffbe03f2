"""The public names of distillkit, and the names in a source text that are not among them."""

import ast
import pkgutil
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module

import distillkit


@cache
def faces() -> dict[str, tuple[str, ...]]:
    """The `__all__` of distillkit, of its modules and of its packages, by the path to import from."""
    modules = [module.name for module in pkgutil.iter_modules(distillkit.__path__) if module.name != "__main__"]
    paths = ["distillkit", *(f"distillkit.{name}" for name in modules)]
    return {path: tuple(sorted(import_module(path).__all__)) for path in paths}


def objects() -> dict[str, object]:
    """Every public object by its path, the longer path if it has two, such as `distillkit.types.Sampling`."""
    paths = [(path, name) for path, names in faces().items() for name in names if name != "__version__"]
    every = {f"{path}.{name}": getattr(import_module(path), name) for path, name in paths}
    in_packages = {id(every[f"{path}.{name}"]) for path, name in paths if path != "distillkit"}
    return {path: value for path, value in every.items() if path.count(".") > 1 or id(value) not in in_packages}


def is_public(path: str) -> bool:
    """True for the path of a package, of a public name, or of an attribute of one, such as `distillkit.losses.DPKD`."""
    parts = path.split(".")
    face = ".".join(parts[:2]) if ".".join(parts[:2]) in faces() else parts[0]
    rest = parts[face.count(".") + 1 :]
    return not rest or rest[0] in faces()[face]


def private_names(source: str) -> list[str]:
    """What a Python source imports, reads or patches of distillkit although it is not public, as `line: path`."""
    tree = ast.parse(source)
    return sorted({f"{line}: {path}" for line, path in _paths(tree) if not is_public(path)})


def private_paths(text: str) -> list[str]:
    """The paths in a configuration that are not public."""
    return [path for path in re.findall(r"\bdistillkit(?:\.\w+)+", text) if not is_public(path)]


def _paths(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The dotted paths within distillkit that a source names, with their lines."""
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and _is_ours(node.module or ""):
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if _is_ours(alias.name):
                    yield node.lineno, alias.name
                    modules[alias.asname or "distillkit"] = alias.name if alias.asname else "distillkit"
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            name, _, attributes = ast.unparse(node).partition(".")
            if name in modules and re.fullmatch(r"[\w.]+", attributes):
                yield node.lineno, f"{modules[name]}.{attributes}"
        elif isinstance(node, ast.Constant) and re.fullmatch(r"distillkit(\.\w+)+", str(node.value)):
            yield node.lineno, str(node.value)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == "distillkit"
