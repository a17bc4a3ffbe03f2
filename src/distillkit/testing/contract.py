"""Shared by the contracts of all kinds: a runner without pytest, and the error for a broken promise."""

from collections.abc import Callable
from typing import Any


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


def broken(part: object, promise: str) -> AssertionError:
    """The error for a part that breaks a promise."""
    return AssertionError(f"{type(part).__name__} breaks its contract: {promise}.")
