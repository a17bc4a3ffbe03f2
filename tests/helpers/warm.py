"""Runs commands and snippets in forks of one process that has the slow imports behind it: seconds become tenths."""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path

HEAVY = (
    "lightning.pytorch.cli",
    "distillkit.workflows.launch",
    "distillkit.testing.losses",
    "distillkit.testing.tiny",
    "peft",
    "pandas",
    "matplotlib.figure",
    "torch.utils.tensorboard",
    "transformers.trainer_utils",
    "transformers.models.llama.modeling_llama",
)


class Warm:
    """The process. Use it as a context manager.

    Args:
        environment: Variables of every command and snippet.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)

    def __enter__(self) -> "Warm":
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._environment
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stdin.close()
        self._server.wait(timeout=60)
        self._server.stdout.close()

    def command(self, arguments: list[str], folder: Path) -> tuple[int, str]:
        """Runs `distillkit` with `arguments` in `folder`; gives the exit status and what it printed."""
        return self._run({"arguments": arguments}, folder)

    def snippet(self, code: str, name: str, folder: Path) -> tuple[int, str]:
        """Runs Python code as a script in `folder`; `name` is what a traceback calls it."""
        return self._run({"code": code, "name": name}, folder)

    def _run(self, job: Mapping[str, object], folder: Path) -> tuple[int, str]:
        output = folder / ".output"
        self._server.stdin.write(json.dumps({**job, "folder": str(folder), "output": str(output)}) + "\n")
        self._server.stdin.flush()
        status = json.loads(self._server.stdout.readline())
        return status, output.read_text()


def _serve() -> None:
    for module in HEAVY:
        __import__(module)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _child(json.loads(line))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        answers.write(f"{status}\n")
        answers.flush()


def _child(job: dict) -> None:
    """Never returns: what the job leaves behind dies with the fork."""
    status = 1
    try:
        output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream, target in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
            os.dup2(stream, target)
        os.chdir(job["folder"])
        if "arguments" in job:
            from distillkit.cli.main import main

            sys.argv = ["distillkit", *job["arguments"]]
            status = main()
        else:
            sys.argv, sys.path[0] = [job["name"]], job["folder"]
            exec(compile(job["code"], job["name"], "exec"), {"__name__": "__main__"})
            status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
