"""Shared by the contracts of all kinds: a runner without pytest, and the error for a broken promise."""

from collections.abc import Callable
from typing import Any

from distillkit.interfaces import Curator, Loss, Schedule


def run_tests(contract: Any, make: Callable[[], object]) -> None:
    """Runs every test of a contract.

    Args:
        contract: An object with methods named `test_…`; its `make` is replaced.
        make: Returns the part under test.

    Raises:
        AssertionError: If a promise is broken; the message says which one.
    """
    contract.make = make
    for name in dir(contract):
        if name.startswith("test_"):
            getattr(contract, name)()


def unlogged_schedules(part: Loss | Curator) -> list[str]:
    """Names of the schedules within a part that `schedules` leaves out, except those within another schedule."""
    modules = dict(part.named_modules())
    outer = {
        name: module
        for name, module in modules.items()
        if isinstance(module, Schedule) and not any(isinstance(modules[above], Schedule) for above in _above(name))
    }
    logged = {id(schedule) for schedule in part.schedules().values()}
    return [name for name, schedule in outer.items() if id(schedule) not in logged]


def _above(name: str) -> list[str]:
    """The names of the modules that contain a module."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def broken(part: object, promise: str) -> AssertionError:
    """The error for a part that breaks a promise."""
    return AssertionError(f"{type(part).__name__} breaks its contract: {promise}.")
