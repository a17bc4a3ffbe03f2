"""Objects of the other process."""

import operator
from collections.abc import Callable
from typing import Any, Protocol


class Channel(Protocol):
    """The way to the other process."""

    def request(self, operation: str, *arguments: object) -> Any:
        """Has the other process do something, and returns the result."""


_OPERATORS = (
    *("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"),
    *("iadd", "isub", "imul", "iand", "ior", "neg", "pos", "abs", "invert", "index"),
    *("getitem", "setitem", "delitem", "contains", "lt", "le", "gt", "ge"),
)
_REFLECTED = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
_FUNCTIONS = (len, iter, next, reversed, bool, int, float, complex, str, repr, hash)


def _reflected(name: str) -> Callable[[object, object], object]:
    operation: Callable[[object, object], object] = getattr(operator, name)
    return lambda value, left: operation(left, value)


OPERATIONS: dict[str, Callable[..., object]] = {
    **{f"__{name}__": getattr(operator, f"__{name}__") for name in _OPERATORS},
    **{f"__r{name}__": _reflected(f"__{name}__") for name in _REFLECTED},
    **{f"__{function.__name__}__": function for function in _FUNCTIONS},
    "__eq__": operator.eq,
    "__enter__": lambda value: type(value).__enter__(value),
    "__exit__": lambda value, *_: type(value).__exit__(value, None, None, None),
}
"""Operations on an object of the other process, by the name of the special method."""


class Remote:
    """An object of the other process, used by reference.

    It equals such objects alone and is ordered among them alone: otherwise a program could answer every test with an
    object that equals whatever is expected.

    Args:
        channel: The way to the other process.
        index: The object's index there.
    """

    __slots__ = ("_channel", "_index")

    def __init__(self, channel: Channel, index: int) -> None:
        object.__setattr__(self, "_channel", channel)
        object.__setattr__(self, "_index", index)

    def __call__(self, *arguments: object, **options: object) -> object:
        """Calls the object in its process."""
        return _request(self, "call", self, list(arguments), options)

    def __getattr__(self, name: str) -> object:
        return _request(self, "get", self, name)

    def __setattr__(self, name: str, value: object) -> None:
        _request(self, "set", self, name, value)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Remote) and bool(_request(self, "operate", "__eq__", self, other)))

    def __hash__(self) -> int:
        return int(_request(self, "operate", "__hash__", self))

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, Remote) and bool(_request(self, "isinstance", instance, self))


def index_of(remote: Remote) -> int:
    """The index of an object in the other process."""
    return int(object.__getattribute__(remote, "_index"))


def _request(remote: Remote, operation: str, *arguments: object) -> Any:
    return object.__getattribute__(remote, "_channel").request(operation, *arguments)


def _special_method(name: str) -> Callable[..., object]:
    is_order = name in ("__lt__", "__le__", "__gt__", "__ge__")

    def method(self: Remote, *arguments: object) -> object:
        if is_order and not isinstance(arguments[0], Remote):
            return NotImplemented
        # Exceptions and their tracebacks don't cross.
        return _request(self, "operate", name, self, *(() if name == "__exit__" else arguments))

    return method


for _name in OPERATIONS.keys() - {"__eq__", "__hash__"}:
    setattr(Remote, _name, _special_method(_name))
