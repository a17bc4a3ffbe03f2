"""One end of the socket between a program and its tests."""

import json
import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

from distillkit.verifiers.examination.remote import OPERATIONS
from distillkit.verifiers.examination.values import SCALARS, Values

MAX_MESSAGE = 2**28
"""Bytes of a message."""

_CLOSED = (
    *(types.ModuleType, types.FunctionType, types.MethodType, types.GeneratorType, types.CoroutineType),
    *(types.AsyncGeneratorType, types.FrameType, types.TracebackType, types.CodeType, type),
)
"""Types whose attributes lead to frames and globals."""


class Peer:
    """Sends requests to the other process and serves its requests.

    Args:
        descriptor: File descriptor of the socket.
        guarded: Whether the other process must not reach this one's frames and globals.
        printed: Returns what was printed here since the last time.
    """

    def __init__(self, descriptor: int, guarded: bool, printed: Callable[[], str] = str) -> None:
        self.guarded, self.printed = guarded, printed
        self.values = Values(self, guarded)
        self.operations: dict[str, Callable[..., object]] = {
            "call": lambda value, arguments, options: value(*arguments, **options),
            "get": self._get,
            "set": self._set,
            "operate": lambda name, *arguments: OPERATIONS[name](*arguments),
            "isinstance": isinstance,
        }
        # Files, since importing `socket` takes longer than most programs.
        self._reader, self._writer = os.fdopen(descriptor, "rb"), os.fdopen(descriptor, "wb", closefd=False)

    def request(self, operation: str, *arguments: Any) -> Any:
        """Has the other process do something, and serves its requests meanwhile.

        Args:
            operation: Name of the operation, one of the other side's `operations`.
            arguments: Its arguments.

        Raises:
            BaseException: What it raised there, in a class of the same name.
        """
        self._send(operation, [self.values.encode(argument) for argument in arguments])
        while True:
            kind, content = self._receive()
            if kind == "return":
                value, changes, printed = content
                sys.stdout.write(printed)
                self.values.apply_changes(arguments[1] if operation == "call" else (), changes)
                return self.values.decode(value)
            if kind == "raise":
                exception = self.values.exception(content[0])
                raise exception.__new__(exception, *content[1])  # __init__ may require other arguments
            self._answer(kind, content)

    def serve(self) -> None:
        """Serves requests until the other process ends."""
        while True:
            self._answer(*self._receive())

    def _answer(self, operation: str, content: Sequence[Any]) -> None:
        try:
            arguments = [self.values.decode(argument) for argument in content]
            value = self.values.encode(self.operations[operation](*arguments))
            changes: list[object] = []
            if operation == "call":
                before = content[1]["list"] if isinstance(content[1], dict) else content[1]
                changes = self.values.encode_changes(arguments[1], before)
            self._send("return", [value, changes, self.printed()])
        except BaseException as error:
            names = [base.__name__ for base in type(error).__mro__]
            is_plain = all(type(part) in SCALARS for part in error.args)
            self._send("raise", [names, error.args if is_plain else [str(error)[:1000]]])

    def _send(self, kind: str, content: Sequence[object]) -> None:
        data = json.dumps([kind, content]).encode()
        self._writer.write(len(data).to_bytes(8) + data)
        self._writer.flush()

    def _receive(self) -> tuple[str, Any]:
        header = self._reader.read(8)
        size = int.from_bytes(header) if len(header) == 8 else MAX_MESSAGE + 1
        data = self._reader.read(size) if size <= MAX_MESSAGE else b""
        if len(data) != size:
            os._exit(1)  # the other process has ended: no exception, which tests could catch
        kind, content = json.loads(data)
        return str(kind), content

    def _get(self, value: object, name: str) -> object:
        self._check_access(value, name)
        return getattr(value, name)

    def _set(self, value: object, name: str, new: object) -> None:
        self._check_access(value, name)
        setattr(value, name, new)

    def _check_access(self, value: object, name: str) -> None:
        if self.guarded and (name.startswith("_") or isinstance(value, _CLOSED)):
            raise AttributeError(name)
