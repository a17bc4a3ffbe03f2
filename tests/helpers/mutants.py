"""Mutants: the package with one line of its source changed, in this process."""

import gc
import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType


@contextmanager
def mutant(module_name: str, old: str, new: str) -> Iterator[None]:
    """Runs a block with `old` in a module's source replaced by `new`.

    The functions that are there get the code of the changed ones, so that imports, decorators and instances elsewhere
    follow.

    Args:
        module_name: Such as `distillkit.models.scoring`.
        old: Text that occurs once in the module's source.
        new: Its replacement, with as many line breaks.
    """
    module = importlib.import_module(module_name)
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{module_name} has {source.count(old)} times: {old}"
    assert old.count("\n") == new.count("\n"), "line numbers must stay as they are"
    file = module.__file__ or ""
    changed = {code.co_qualname: code for code in _codes(compile(source.replace(old, new), file, "exec"))}
    functions = [
        function
        for function in gc.get_objects()
        if isinstance(function, FunctionType)
        and function.__code__.co_filename == file
        and function.__code__.co_qualname in changed
        and function.__code__.co_firstlineno == changed[function.__code__.co_qualname].co_firstlineno
    ]
    before = [function.__code__ for function in functions]
    for function in functions:
        function.__code__ = changed[function.__code__.co_qualname]
    try:
        yield
    finally:
        for function, code in zip(functions, before, strict=True):
            function.__code__ = code


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
