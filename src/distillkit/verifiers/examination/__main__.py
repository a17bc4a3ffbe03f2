"""The two processes: `python -m distillkit.verifiers.examination program|tests SOCKET MEMORY SECONDS`."""

import builtins
import io
import json
import os
import sys
import types
from collections.abc import Sequence

from distillkit.verifiers.examination.peer import Peer

MAX_PRINTED = 2**20
"""Characters that a program may print in one call."""


class Output(io.TextIOBase):
    """Keeps what a program prints, up to a limit, until it is taken."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.size = 0

    def write(self, text: str, /) -> int:
        """Adds a text, or drops it if there is too much already."""
        if self.size + len(text) <= MAX_PRINTED:
            self.parts.append(text)
            self.size += len(text)
        return len(text)

    def take(self) -> str:
        """Returns what was printed since the last time."""
        text = "".join(self.parts)
        self.parts, self.size = [], 0
        return text


class Input(io.TextIOBase):
    """The program's standard input: that of the tests, which may have replaced it."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer

    def readline(self, size: int | None = -1, /) -> str:  # type: ignore[override]
        """Returns the next line, or an empty text at the end."""
        return str(self.peer.request("readline"))

    def read(self, size: int | None = -1, /) -> str:
        """Returns all lines that are left."""
        return "".join(iter(self.readline, ""))


class Namespace(dict[str, object]):
    """The tests' globals: their names, then those of Python, then those that the program defines."""

    def __init__(self, peer: Peer) -> None:
        super().__init__(__name__="__main__")
        self.peer = peer

    def __missing__(self, name: str) -> object:
        # Names of Python come first, so that a program can't redefine `len` for the tests.
        exists, value = (False, None) if hasattr(builtins, name) else self.peer.request("name", name)
        if not exists:
            raise KeyError(name)
        return value


def serve_program(peer: Peer) -> None:
    """Runs a program's code when the tests' process sends it, and then what the tests ask for."""
    module = types.ModuleType("solution")
    sys.modules["solution"] = module  # dataclasses look their module up

    def load(blocks: Sequence[tuple[str, bool]]) -> None:
        for source, is_example in blocks:
            try:
                exec(compile(source, "solution", "exec"), vars(module))
            except (Exception, SystemExit):
                if not is_example:
                    raise

    def find(name: str) -> tuple[bool, object]:
        return name in vars(module), vars(module).get(name)

    peer.operations |= {"load": load, "name": find}
    sys.stdin = Input(peer)
    peer.serve()


def run_tests(peer: Peer, blocks: Sequence[tuple[str, bool]], tests: str) -> None:
    """Loads the program in the other process and runs the tests in this one.

    Raises:
        BaseException: What the program raised when it was loaded, or what the tests raised.
    """
    original = builtins.input

    def readline() -> str:
        return f"{input()}\n" if builtins.input is not original else sys.stdin.readline()

    peer.operations["readline"] = readline
    peer.request("load", [tuple(block) for block in blocks])
    exec(compile(tests, "tests", "exec"), Namespace(peer))


def limit(memory: int, seconds: int) -> None:
    """Limits this process where the system can: bytes of memory, seconds of computing, bytes of a file, crash dumps."""
    try:
        import resource
    except ImportError:  # not Unix
        return
    for name, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 2**24),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(name, (value, value))


def main(role: str, descriptor: str, memory: str, seconds: str) -> None:
    """Runs one of the two processes.

    That of the tests reads program, tests and a password from its standard input, and writes the password to its
    standard output once the tests have passed.
    """
    limit(int(memory), int(seconds))
    sys.set_int_max_str_digits(0)
    if role == "program":
        sys.stdout = output = Output()
        serve_program(Peer(int(descriptor), guarded=False, printed=output.take))
    task = json.load(sys.stdin)
    result, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    run_tests(Peer(int(descriptor), guarded=True), task["blocks"], task["tests"])
    os.write(result, task["password"].encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
