"""Sandboxes for programs that a model generated: bubblewrap, or a process with limits."""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Literal

from distillkit.errors import ConfigError
from distillkit.verifiers.watch import watched

Mode = Literal["auto", "bubblewrap", "none"]

DISK = 64 * 2**20
"""Bytes that a program in bubblewrap may write."""

_PACKAGE = Path(__file__).resolve().parents[1]
_FOLDER = "/sandbox"
_SYSTEM = (
    "/usr",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/bin",
    "/sbin",
    "/nix/store",
    "/gnu/store",
    "/etc/ld.so.cache",
)


class Sandbox:
    """Starts programs in bubblewrap, or without a sandbox in processes with limits.

    In bubblewrap (`bwrap`), a program sees a read-only system, this interpreter and an empty folder in memory. It has
    no network, no other processes, no privileges and no `/proc`, and all its processes end with it. Without it, a
    program has a folder and a session of its own and an empty environment, but your permissions.

    Args:
        mode: `bubblewrap`, `none`, or `auto` for bubblewrap where it works.

    Raises:
        ConfigError: If `mode` is `bubblewrap` and it doesn't work, or the system is not Unix.
    """

    def __init__(self, mode: Mode = "auto") -> None:
        if os.name != "posix":
            raise ConfigError("Generated programs are only run on Linux and macOS: use another verifier.")
        self.problem = "" if mode == "none" else bubblewrap_problem()
        if mode == "bubblewrap" and self.problem:
            raise ConfigError(
                f"sandbox: bubblewrap is required and does not work ({self.problem}): install it (Debian: apt-get "
                "install bubblewrap), allow user namespaces, or choose another sandbox."
            )
        self.is_closed = mode != "none" and not self.problem

    @contextlib.contextmanager
    def started(
        self, arguments: Sequence[str], descriptor: int, stdin: int | IO[bytes], stdout: int, memory: int
    ) -> Iterator[None]:
        """Runs Python while the context lasts, and kills it with all that it started; earlier if that is too much.

        Args:
            arguments: Arguments of Python, which can import distillkit.
            descriptor: File descriptor that it inherits.
            stdin: Its standard input.
            stdout: File descriptor of its standard output.
            memory: Bytes of memory of all its processes together.
        """
        with contextlib.ExitStack() as stack:
            folder = _FOLDER if self.is_closed else stack.enter_context(_scratch_folder())
            command = [sys.executable, "-s", "-P", "-B", *arguments]
            process = subprocess.Popen(
                [*_bubblewrap(), *command] if self.is_closed else command,
                stdin=stdin,
                stdout=stdout,
                stderr=subprocess.DEVNULL,
                cwd=None if self.is_closed else folder,
                env=_environment(folder),
                pass_fds=[descriptor],
                start_new_session=True,
            )
            try:
                with watched(process.pid, memory):
                    yield
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
                process.wait()


@functools.cache
def bubblewrap_problem() -> str:
    """The reason why bubblewrap can't be used here; empty if it can."""
    if shutil.which("bwrap") is None:
        return "bwrap is not installed"
    command = [*_bubblewrap(), sys.executable, "-s", "-P", "-c", "import distillkit"]
    try:
        process = subprocess.run(command, capture_output=True, env=_environment(_FOLDER), timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"bwrap fails: {error}"
    lines = process.stderr.decode(errors="replace").split("\n")
    message = next((line.strip() for line in reversed(lines) if line.strip()), "no message")
    return "" if process.returncode == 0 else f"bwrap fails with status {process.returncode}: {message}"


def _environment(folder: str) -> dict[str, str]:
    """All environment variables of a program. With equal hashes, sets have the same order in every run."""
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": folder,
        "TMPDIR": folder,
        "LANG": "C.UTF-8",
        "PYTHONPATH": str(_PACKAGE.parent),
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def _bubblewrap() -> list[str]:
    """The bwrap command before the command to run."""
    command = [shutil.which("bwrap") or "bwrap", "--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534"]
    command += ["--cap-drop", "ALL", "--die-with-parent", "--clearenv"]
    for name, value in _environment(_FOLDER).items():
        command += ["--setenv", name, value]
    # No --proc: to a program of root, /proc/sys would be writable.
    command += ["--dev", "/dev", "--size", str(DISK), "--tmpfs", "/dev/shm", "--remount-ro", "/dev"]
    command += ["--size", str(DISK), "--tmpfs", "/tmp", "--size", str(DISK), "--tmpfs", _FOLDER]
    for path in _SYSTEM:
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        elif os.path.exists(path):
            command += ["--ro-bind", path, path]
    for path in sorted({sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix, str(_PACKAGE)}):
        if path != "/":
            command += ["--ro-bind", path, path]
    return [*command, "--remount-ro", "/", "--chdir", _FOLDER, "--"]


@contextlib.contextmanager
def _scratch_folder() -> Iterator[str]:
    """An empty folder that is removed afterwards, whatever lies in it then."""
    folder = tempfile.mkdtemp(prefix="distillkit-program-")
    try:
        yield folder
    finally:
        remove_tree(folder)


def remove_tree(folder: str) -> None:
    """Removes a folder as far as possible, without an error.

    Python's own removal fails in folders that are closed or thousands deep; those of the system don't.
    """
    try:
        shutil.rmtree(folder)
    except (OSError, RecursionError):
        for command in (["chmod", "-R", "u+rwx", "--", folder], ["rm", "-rf", "--", folder]):
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run(command, capture_output=True, timeout=60, check=False)
