"""Values as JSON: plain data by value, everything else by reference."""

import builtins
import collections
import importlib
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distillkit.verifiers.examination.remote import Channel, Remote, index_of

SCALARS = {type(None), bool, int, float, str}
"""Types that are JSON's own."""

_SEQUENCES: Mapping[str, Callable[..., object]] = {
    kind.__name__: kind for kind in (list, tuple, set, frozenset, collections.deque)
}
_MAPPINGS: Mapping[str, Callable[..., object]] = {
    kind.__name__: kind for kind in (dict, collections.Counter, collections.OrderedDict)
}
_PACKED: Mapping[str, Callable[[Any], object]] = {
    "builtins.complex": lambda value: [value.real, value.imag],
    "builtins.bytes": lambda value: [list(value)],
    "builtins.bytearray": lambda value: [list(value)],
    "builtins.range": lambda value: [value.start, value.stop, value.step],
    "fractions.Fraction": lambda value: [value.numerator, value.denominator],
    "decimal.Decimal": lambda value: [str(value)],
    "datetime.datetime": lambda value: value.isoformat(),
    "datetime.date": lambda value: value.isoformat(),
    "datetime.time": lambda value: value.isoformat(),
    "datetime.timedelta": lambda value: [value.days, value.seconds, value.microseconds],
}
"""Types whose values cross as the arguments that make them, or as a text in the ISO format. Named, since importing them
all would take longer than most programs."""

_MUTABLE = (list, dict, set, bytearray, collections.deque)


class Values:
    """The values that cross between two processes.

    Args:
        channel: The way to the other process.
        guarded: Whether the other process may not send functions of Python by name, such as `exec`.
    """

    def __init__(self, channel: Channel, guarded: bool) -> None:
        self.channel, self.guarded = channel, guarded
        self.objects: list[object] = []
        self._indices: dict[int, int] = {}
        self._remotes: dict[int, Remote] = {}
        self._exceptions: dict[str, type[BaseException]] = {}

    def encode(self, value: Any) -> object:
        """A value as JSON: itself, or an object with the name of its kind and its content."""
        kind = type(value)
        name = kind.__name__
        if kind in SCALARS or (kind is list and SCALARS.issuperset(map(type, value))):
            return value
        if isinstance(value, Remote):
            return {"yours": index_of(value)}
        if _SEQUENCES.get(name) is kind:
            return {name: [self.encode(item) for item in value]}
        if _MAPPINGS.get(name) is kind:
            return {name: [[self.encode(key), self.encode(item)] for key, item in value.items()]}
        if kind is collections.defaultdict:
            return self.encode(dict(value))
        path = f"{kind.__module__}.{name}"
        if path in _PACKED and getattr(sys.modules[kind.__module__], name) is kind:
            return {path: _PACKED[path](value)}
        return self._encode_object(value, kind)

    def _encode_object(self, value: Any, kind: type) -> object:
        name = str(getattr(value, "__name__", ""))
        if isinstance(value, types.ModuleType):
            return {"module": name}
        if isinstance(value, type) and issubclass(value, BaseException):
            return {"exception": [base.__name__ for base in value.__mro__]}
        if getattr(builtins, name, None) is value and (isinstance(value, type) or self.guarded):
            return {"builtin": name}
        if isinstance(value, tuple) and hasattr(kind, "_fields"):
            return {"namedtuple": [kind.__name__, list(kind._fields), [self.encode(item) for item in value]]}
        if kind.__module__ == "numpy" and hasattr(value, "tolist"):
            content = self.encode(value.tolist())
            return {"array": content} if kind.__name__ == "ndarray" else content
        if id(value) not in self._indices:
            self._indices[id(value)] = len(self.objects)
            self.objects.append(value)
        return {"mine": self._indices[id(value)]}

    def decode(self, data: object) -> Any:
        """The value of some JSON from `encode`."""
        if isinstance(data, list):
            return list(data) if SCALARS.issuperset(map(type, data)) else [self.decode(item) for item in data]
        if not isinstance(data, dict):
            return data
        ((name, content),) = data.items()
        if name in _SEQUENCES:
            return _SEQUENCES[name](map(self.decode, content))
        if name in _MAPPINGS:
            return _MAPPINGS[name]({self.decode(key): self.decode(item) for key, item in content})
        if name in _PACKED:
            module, _, kind = name.partition(".")
            make = getattr(importlib.import_module(module), kind)
            return make.fromisoformat(content) if isinstance(content, str) else make(*content)
        return self._decode_object(name, content)

    def _decode_object(self, name: str, content: Any) -> object:
        match name:
            case "yours":
                return self.objects[content]
            case "mine":
                return self._remotes.setdefault(content, Remote(self.channel, content))
            case "module":
                return importlib.import_module(content)
            case "exception":
                return self.exception(content)
            case "builtin" if not self.guarded or isinstance(getattr(builtins, content), type):
                return getattr(builtins, content)
            case "namedtuple":
                return collections.namedtuple(content[0], content[1])(*map(self.decode, content[2]))
            case "array":
                return importlib.import_module("numpy").array(self.decode(content))
        raise ValueError(name)

    def exception(self, names: Sequence[str]) -> type[BaseException]:
        """The class of an exception by its name and those of its bases: Python's, or one made for the program's."""
        builtin = getattr(builtins, names[0], None) if names else Exception
        if isinstance(builtin, type) and issubclass(builtin, BaseException):
            return builtin
        if names[0] not in self._exceptions:
            self._exceptions[names[0]] = type(names[0], (self.exception(names[1:]),), {})
        return self._exceptions[names[0]]

    def encode_changes(self, arguments: Sequence[object], before: Sequence[object]) -> list[object]:
        """The arguments that a call has changed, as JSON; None for the others.

        Args:
            arguments: The arguments of the call.
            before: The same as JSON, before it.
        """
        after = [self.encode(argument) if isinstance(argument, _MUTABLE) else None for argument in arguments]
        return [None if new == old else new for new, old in zip(after, before, strict=True)]

    def apply_changes(self, arguments: Sequence[Any], changes: Sequence[object]) -> None:
        """Changes lists, dictionaries and sets in place as the other process changed its copies."""
        for target, change in zip(arguments, changes, strict=True):
            if change is None:
                continue
            new = self.decode(change)
            if isinstance(target, list | bytearray):
                target[:] = new
            elif isinstance(target, collections.deque):
                target.clear()
                target.extend(new)
            elif isinstance(target, dict | set):
                target.clear()
                target.update(new)
