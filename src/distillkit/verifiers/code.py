"""Verifier for Python code: runs the response against tests. Execution is off by default."""

import ast
import json
import logging
import os
import secrets
import selectors
import socket
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import astuple

from distillkit.errors import ConfigError, DataError, check_range
from distillkit.interfaces import Verifier
from distillkit.remote import consent
from distillkit.types import Prompts, Response
from distillkit.verifiers.code_blocks import Block, code_blocks
from distillkit.verifiers.sandbox import Mode, Sandbox

_log = logging.getLogger(__name__)


class PythonTests(Verifier):
    """1 if a response's Python code passes the tests in the prompt's reference response, else 0.

    The tests are statements, such as assertions, that run after the code, as in HumanEval (Chen et al. 2021, arXiv
    2107.03374) and MBPP. The code is the content of the response's fenced Python blocks, or the whole response if it
    has no fences; it runs as an imported module, without its `if __name__ == "__main__"`.

    Code and tests run in two processes, and the tests call the code through a socket: values of Python's own types
    cross it, other objects are used by reference. So code can't read what the tests expect or report their success. An
    object of a class that the code defines never equals plain data.

    **Generated programs are dangerous.** In bubblewrap they have neither a network nor your files, and all their
    processes end with them. Without it they have your permissions, within limits on time, memory and file size: they
    can read your files and other processes, use the network and leave processes behind. So this needs your consent in
    the environment, `DISTILLKIT_ALLOW=code`: give it only in a container or on a machine where they can do no harm.

    Args:
        allow_execution: Whether to run programs that a model generated.
        timeout: Seconds per program, at least 1.
        memory: MiB for all processes of a program together, at least 64; they are at most 64, threads included.
        workers: Number of programs that run at the same time, at least 1.
        sandbox: `bubblewrap` requires it, `none` runs without it, and `auto` uses it where it works.

    Raises:
        ConfigError: If `allow_execution` is not set, a number is out of range, bubblewrap is required and doesn't
            work, or the user's environment does not permit programs without it (`DISTILLKIT_ALLOW=code`).
    """

    needs_reference = True

    def __init__(
        self,
        allow_execution: bool = False,
        timeout: int = 10,
        memory: int = 1024,
        workers: int = 4,
        sandbox: Mode = "auto",
    ) -> None:
        check_range("PythonTests.timeout", timeout, 1)
        check_range("PythonTests.memory", memory, 64)
        check_range("PythonTests.workers", workers, 1)
        if not allow_execution:
            raise ConfigError(
                "PythonTests runs generated programs. Set PythonTests.allow_execution to true only where that is safe: "
                "with `sandbox: bubblewrap`, or in a container without a network."
            )
        self.timeout, self.memory, self.workers = timeout, memory, workers
        self.sandbox = Sandbox(sandbox)
        if not self.sandbox.is_closed:
            reason = f" ({self.sandbox.problem})" if self.sandbox.problem else ""
            warning = f"PythonTests runs generated programs with your permissions and without a sandbox{reason}"
            consent.require("code", warning)
            _log.warning("%s", warning)

    def check(self, prompts: Prompts) -> None:
        """Checks that every prompt has tests that test something.

        Raises:
            DataError: If a prompt has no tests, they are not valid Python, or they only define functions.
        """
        for prompt in prompts:
            where = f"prompt {prompt.messages[-1]['content'][:60]!r}"
            if not (prompt.reference or "").strip():
                raise DataError(
                    f"PythonTests needs tests as the response in the data, and {where} has none: add them, or use "
                    "another verifier."
                )
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    tree = ast.parse(prompt.reference or "")
            except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
                raise DataError(
                    f"PythonTests: the tests of {where} are not valid Python ({error}): correct them."
                ) from error
            if not any(isinstance(node, ast.Assert | ast.Call | ast.Raise) for node in _executed(tree)):
                raise DataError(
                    f"PythonTests: the tests of {where} test nothing, so that any response would pass: add assertions, "
                    "or a call of the function that has them, such as check(candidate)."
                )

    def verify(self, prompts: Prompts, responses: Sequence[Response]) -> list[float]:
        """0 or 1 for each response.

        Raises:
            DataError: If a prompt has no tests.
        """
        self.check(prompts)
        with ThreadPoolExecutor(self.workers) as pool:
            programs = [code_blocks(response.text) for response in responses]
            tests = [prompt.reference or "" for prompt in prompts]
            return [float(passed) for passed in pool.map(self._passes, programs, tests)]

    def _passes(self, program: Sequence[Block], tests: str) -> bool:
        """Runs a program and its tests; returns True if the tests reach their end, where they write a password."""
        if not program:
            return False
        password = secrets.token_hex(16)
        task = {"blocks": [astuple(block) for block in program], "tests": tests, "password": password}
        with ExitStack() as stack:
            file = stack.enter_context(tempfile.TemporaryFile())
            file.write(json.dumps(task).encode())
            file.seek(0)
            ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
            reader, writer = os.pipe()
            stack.callback(os.close, reader)
            limits = (str(self.memory * 2**20), str(self.timeout))
            for role, end, stdin, stdout in (
                ("program", theirs, subprocess.DEVNULL, subprocess.DEVNULL),
                ("tests", ours, file, writer),
            ):
                arguments = ("-m", "distillkit.verifiers.examination", role, str(end.fileno()), *limits)
                stack.enter_context(self.sandbox.started(arguments, end.fileno(), stdin, stdout, self.memory * 2**20))
                end.close()  # so that each process sees when the other one ends
            os.close(writer)
            return _read(reader, len(password), self.timeout + 1) == password.encode()


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a syntax tree that run by themselves, without the bodies of functions and classes."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            yield node
            yield from _executed(node)


def _read(descriptor: int, size: int, seconds: float) -> bytes:
    """Reads at most `size` bytes until the other end is closed or the time is over."""
    deadline, data = time.monotonic() + seconds, b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while len(data) < size and (left := deadline - time.monotonic()) > 0 and selector.select(left):
            part = os.read(descriptor, size - len(data))
            if not part:
                break
            data += part
    return data
