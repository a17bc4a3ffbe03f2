"""Judging Python code by running it against tests. It is off unless it is allowed."""

import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from distillkit.errors import ConfigError, DataError
from distillkit.interfaces import Verifier
from distillkit.types import Prompts, Response

_log = logging.getLogger(__name__)

_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_LIMITED = """\
import sys
try:
    import resource
except ImportError:  # not Unix
    pass
else:
    memory, seconds = int(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**24, 2**24))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
word, _, source = sys.stdin.read().partition("\\n")
exec(compile(source, "response", "exec"), {"__name__": "__main__"})
sys.stdout.write(word)
"""


class PythonTests(Verifier):
    """1 if a response's Python code passes the tests that came as the prompt's response, else 0.

    The tests are statements, such as assertions, that run after the code: as in HumanEval (Chen et al. 2021, arXiv
    2107.03374) and MBPP. The code is the response's fenced blocks, or else all of it.

    **A model's program runs with your rights.** Each runs in a process and an empty folder of its own, without the
    environment's variables, with limits on time, memory and file size (on Unix), but neither the network nor your files
    are closed to it: allow it within a container or on a machine that has nothing to lose.

    Args:
        allow_execution: Whether programs that a model wrote may run here.
        timeout: Seconds for each program, at least 1.
        memory: MiB for each program, at least 64.
        workers: Programs at once, at least 1.

    Raises:
        ConfigError: If `allow_execution` is not set, or a number is out of range.
    """

    needs_reference = True

    def __init__(self, allow_execution: bool = False, timeout: int = 10, memory: int = 1024, workers: int = 4) -> None:
        for name, number, least in (("timeout", timeout, 1), ("memory", memory, 64), ("workers", workers, 1)):
            if number < least:
                raise ConfigError(f"PythonTests.{name} must be at least {least}, got {number}.")
        if not allow_execution:
            raise ConfigError(
                "PythonTests runs programs that a model wrote, with your rights and without a sandbox: set "
                "allow_execution to true where that can do no harm, such as in a container without a network."
            )
        _log.warning("PythonTests runs programs that a model wrote, with your rights and without a sandbox")
        self.timeout, self.memory, self.workers = timeout, memory, workers

    def check(self, prompts: Prompts) -> None:
        """Refuses prompts without tests.

        Raises:
            DataError: If one has none, or they are no Python.
        """
        for prompt in prompts:
            where = f"prompt {prompt.messages[-1]['content'][:60]!r}"
            if not (prompt.reference or "").strip():
                raise DataError(f"PythonTests needs tests in the place of the data's response, and {where} has none.")
            try:
                compile(prompt.reference or "", "tests", "exec")
            except (SyntaxError, ValueError) as error:
                raise DataError(f"PythonTests: the tests of {where} are no Python ({error}): correct them.") from error

    def verify(self, prompts: Prompts, responses: Sequence[Response]) -> list[float]:
        """0 or 1 for each response.

        Raises:
            DataError: If a prompt has no tests.
        """
        self.check(prompts)
        programs = [
            f"{code_of(response.text)}\n\n{prompt.reference}\n"
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        with ThreadPoolExecutor(self.workers) as pool:
            return [float(passed) for passed in pool.map(self._passes, programs)]

    def _passes(self, program: str) -> bool:
        """Whether a program gets to its end, where a word is written; one that means to deceive could write it too."""
        word = os.urandom(16).hex()
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-I", "-c", _LIMITED, str(self.memory * 2**20), str(self.timeout)]
            try:
                done = subprocess.run(
                    command, input=f"{word}\n{program}".encode("utf-8", "replace"), capture_output=True,
                    cwd=folder, env={}, timeout=self.timeout + 1, start_new_session=True,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                return False
        return done.returncode == 0 and done.stdout.endswith(word.encode())


def code_of(text: str) -> str:
    """The Python code of a response: its fenced blocks one after the other, or else all of it."""
    blocks = _FENCED.findall(text)
    return "\n\n".join(blocks) if blocks else text
