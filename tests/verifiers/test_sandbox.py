"""Attacks of programs on whoever runs them; each is one that works where nothing is done against it."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from distillkit.types import Prompt, Prompts, Response
from distillkit.verifiers.code import PythonTests
from distillkit.verifiers.sandbox import Sandbox, bubblewrap_problem, remove_tree

PROBLEM = bubblewrap_problem()
bubblewrap = pytest.param(
    "bubblewrap", marks=pytest.mark.skipif(bool(PROBLEM), reason=f"needs bubblewrap: {PROBLEM or 'it works'}")
)
MODES = [bubblewrap, "none"]


@pytest.fixture(autouse=True)
def _consent(monkeypatch):
    monkeypatch.setenv("DISTILLKIT_ALLOW", "code")


def passed(program, tests="assert attack() == 4", sandbox="none", timeout=10, **settings):
    prompts = Prompts((Prompt("a", ({"role": "user", "content": "?"},), (1,), reference=textwrap.dedent(tests)),))
    verifier = PythonTests(allow_execution=True, sandbox=sandbox, timeout=timeout, **settings)
    (score,) = verifier.verify(prompts, [Response("a", (1,), textwrap.dedent(program), "stop")])
    return score == 1.0


# ── cheats ────────────────────────────────────────────────────────────────────────────────────────────────────────────

CHEATS = {
    "reads a password in the frames of its caller": """
        import os, re, sys
        frame = sys._getframe()
        while frame:
            for values in (frame.f_locals, frame.f_globals):
                for value in list(values.values()):
                    if isinstance(value, str) and re.fullmatch("[0-9a-f]{32}", value):
                        os.write(1, value.encode())
                        os._exit(0)
            frame = frame.f_back
        """,
    "writes the password that it looks for in memory": """
        import gc, os, re, sys
        def attack():
            for value in gc.get_objects():
                for word in re.findall(r"\\b[0-9a-f]{32}\\b", repr(value)[:10000]):
                    for descriptor in range(20):
                        try: os.write(descriptor, word.encode())
                        except OSError: pass
            os._exit(0)
        """,
    "ends with success": "import os\ndef attack(): os._exit(0)",
    "ends with success at once": "import os\nos._exit(0)",
    "raises what ends a run with success": "def attack(): raise SystemExit(0)",
    "returns what equals everything": """
        class Anything:
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            __hash__ = None
        def attack(): return Anything()
        """,
    "returns a number that equals everything": """
        class Anything(int):
            def __eq__(self, other): return True
        def attack(): return Anything(3)
        """,
    "replaces functions of Python": """
        import builtins
        class AssertionError(Exception): pass
        def len(value): return 4
        builtins.len = builtins.abs = builtins.isinstance = len
        def attack(): return 5
        """,
    "traces its caller": """
        import sys, threading
        def skip(frame, event, argument):
            frame.f_trace_lines = False
            return lambda *rest: None
        sys.settrace(skip)
        sys.setprofile(skip)
        def attack(): return 5
        """,
    "does something at the end": "import atexit, os\natexit.register(os._exit, 0)\ndef attack(): return 5",
    "reaches the tests through a function of theirs": """
        def attack(function=None):
            for name in ("__globals__", "__code__", "gi_frame", "__self__", "__class__", "__builtins__"):
                try: found = getattr(function, name)
                except AttributeError: continue
                if name != "__class__": return 4
            return 5
        """,
    "answers for the tests on their socket": """
        import os, json, struct
        data = json.dumps(["return", [4, [], ""]]).encode()
        for descriptor in range(3, 20):
            try: os.write(descriptor, (struct.pack(">Q", len(data)) + data) * 3)
            except OSError: pass
        def attack(): return 5
        """,
}


@pytest.mark.parametrize("sandbox", MODES)
@pytest.mark.parametrize("cheat", CHEATS)
def test_a_program_can_not_cheat(cheat, sandbox):
    tests = "def own(): pass\nassert attack(own) == 4" if "theirs" in cheat else "assert abs(attack()) == 4"
    if "equals" in cheat:
        tests = "assert attack() == 4"
    if cheat == "answers for the tests on their socket":
        tests = "assert attack() == 4 and attack() == 4\nassert len([attack()]) == 1 and attack() == 6"
    assert not passed(CHEATS[cheat], tests, sandbox)


# ── harm ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("sandbox", MODES)
def test_output_does_not_reach_this_process(sandbox):
    program = """
        import os, sys
        def attack():
            line = b"x" * 2**20
            for _ in range(500):
                for descriptor in (1, 2):
                    os.write(descriptor, line)
            print("y" * 2**24)
            return 4
        """
    before = peak_memory()
    assert passed(program, sandbox=sandbox)
    assert peak_memory() - before < 2**25


def peak_memory():
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("sandbox", MODES)
def test_a_program_that_starts_processes_without_end_is_killed(sandbox):
    program = """
        import os, time
        def attack():
            for _ in range(2000):
                if os.fork() == 0:
                    os.setsid()
                    time.sleep(90)
                    os._exit(0)
                time.sleep(0.002)
            return 4
        """
    start = time.monotonic()
    assert not passed(program, sandbox=sandbox, timeout=80)
    assert time.monotonic() - start < 60, "it would last until the time is over"


@pytest.mark.parametrize("sandbox", MODES)
def test_the_memory_of_all_processes_together_is_bounded(sandbox):
    program = """
        import os, time
        def attack():
            for _ in range(8):
                if os.fork() == 0:
                    filled = b"x" * (100 * 2**20)
                    time.sleep(30)
                    os._exit(len(filled) % 1)
            time.sleep(4)
            return 4
        """
    assert not passed(program, sandbox=sandbox, timeout=30, memory=512)
    assert passed(program.replace("range(8)", "range(2)"), sandbox=sandbox, timeout=30, memory=1024)


@pytest.mark.parametrize("sandbox", MODES)
def test_no_process_outlives_its_program(sandbox):
    marker = f"outliving-{os.getpid()}-{time.monotonic_ns()}"
    program = f"""
        import os, subprocess, sys, time
        def attack():
            for _ in range(20):
                subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "{marker}"])
            return 4
        """
    assert passed(program, sandbox=sandbox)
    assert gone(marker)


@pytest.mark.skipif(bool(PROBLEM), reason=f"needs bubblewrap: {PROBLEM or 'it works'}")
def test_no_process_in_a_session_of_its_own_outlives_its_program_in_bubblewrap():
    marker = f"outliving-{os.getpid()}-{time.monotonic_ns()}"
    program = f"""
        import os, subprocess, sys, time
        def attack():
            for _ in range(5):
                command = [sys.executable, "-c", "import time; time.sleep(60)", "{marker}"]
                subprocess.Popen(command, start_new_session=True)
            while True: pass
        """
    assert not passed(program, sandbox="bubblewrap", timeout=1)
    assert gone(marker)


def gone(marker):
    """True once no process has this word in its command."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        commands = [read(path) for path in Path("/proc").glob("[0-9]*/cmdline")]
        if not any(marker.encode() in command for command in commands):
            return True
        time.sleep(0.05)
    return False


def read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


DEEP = """
    import os
    def attack():
        for _ in range({depth}):
            os.mkdir("d")
            os.chdir("d")
        open("f", "w").close()
        return 4
    """


@pytest.mark.parametrize("sandbox", MODES)
def test_deep_folders_are_removed(sandbox, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert passed(DEEP.format(depth=1200), sandbox=sandbox)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_resists_is_removed(tmp_path):
    folder = tmp_path / "folder"
    (folder / "a" / "b" / "c").mkdir(parents=True)
    (folder / "a" / "b" / "file").write_text("x")
    (folder / "link").symlink_to(tmp_path)
    (folder / "moved-1").mkdir()
    (folder / "moved-1" / "moved-2").mkdir()
    for path in ("a/b", "a", "."):
        (folder / path).chmod(0o500)
    (folder / ".").chmod(0o700)
    remove_tree(str(folder))
    assert list(tmp_path.iterdir()) == []
    remove_tree(str(folder))  # without an error


CLOSED = {
    "the environment of its parent": """
        import glob, os
        def attack():
            for path in glob.glob("/proc/[0-9]*/environ"):
                if b"A_SECRET_KEY" in open(path, "rb").read():
                    return 4
        """,
    "files of the user": """
        def attack():
            return 4 if open({secret!r}).read() == "secret" else 5
        """,
    "the network": """
        import socket
        def attack():
            socket.create_connection(("127.0.0.1", {port}), timeout=1)
            return 4
        """,
    "its parent": """
        import os, signal
        def attack():
            for pid in range(2, 2**16):
                if pid not in (os.getpid(),):
                    try: os.kill(pid, 0)
                    except PermissionError: pass
                    except ProcessLookupError: continue
                    return 4
        """,
    "settings of the system": """
        def attack():
            with open("/proc/sys/kernel/core_pattern", "r+") as file:
                pattern = file.read()
                file.seek(0)
                file.write(pattern)
            return 4
        """,
    "a read-only file": """
        import sys
        def attack():
            open(sys.executable, "r+b")
            return 4
        """,
    "privileges": """
        import os
        def attack():
            os.setuid(0)
            os.chroot("/usr")
            return 4
        """,
}


@pytest.mark.skipif(bool(PROBLEM), reason=f"needs bubblewrap: {PROBLEM or 'it works'}")
@pytest.mark.parametrize("target", CLOSED)
def test_a_program_in_bubblewrap_does_not_reach(target, tmp_path, monkeypatch):
    import socket

    monkeypatch.setenv("A_SECRET_KEY", "secret")
    secret = tmp_path / "secret"
    secret.write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = (
            CLOSED[target].format(secret=str(secret), port=server.getsockname()[1])
            if "{" in CLOSED[target]
            else CLOSED[target]
        )
        assert not passed(program, sandbox="bubblewrap")


@pytest.mark.skipif(bool(PROBLEM), reason=f"needs bubblewrap: {PROBLEM or 'it works'}")
def test_the_disk_of_a_program_in_bubblewrap_is_limited():
    program = """
        import itertools, os
        def attack():
            written = 0
            try:
                for number in itertools.count():
                    for folder in (".", "/tmp", "/dev/shm"):
                        with open(f"{folder}/{number}", "wb") as file:
                            written += file.write(bytes(2**23))
            except OSError:
                return written
        """
    assert passed(program, tests="assert 2**23 <= attack() <= 3 * 2**26", sandbox="bubblewrap")


def test_a_program_without_a_sandbox_has_its_own_session_folder_and_environment(monkeypatch):
    monkeypatch.setenv("A_SECRET_KEY", "secret")
    program = """
        import os
        def look():
            return os.getsid(0), os.getpgid(0), os.getpid(), os.getcwd(), sorted(os.environ), os.listdir()
        """
    tests = f"""
        session, group, process, folder, names, files = look()
        assert session == group == process != {os.getsid(0)}
        assert folder not in ("/", {os.getcwd()!r}) and files == []
        assert "A_SECRET_KEY" not in names and len(names) < 12
        """
    assert passed(program, tests, sandbox="none")


def test_the_order_of_sets_is_the_same_in_every_run():
    assert len({run_order() for _ in range(3)}) == 1


def run_order():
    reader, writer = os.pipe()
    code = "print(list({'a', 'b', 'c', 'd', 'e', 'f'}))"
    started = Sandbox("none").started(("-c", code), writer, subprocess.DEVNULL, writer, memory=2**30)
    with os.fdopen(reader) as stream, started:
        os.close(writer)
        return stream.read()


def test_the_reason_why_bubblewrap_does_not_work_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert bubblewrap_problem.__wrapped__() == "bwrap is not installed"
    failing = tmp_path / "bwrap"
    failing.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('No permissions to create a new namespace')\n")
    failing.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda name: str(failing))
    assert bubblewrap_problem.__wrapped__() == "bwrap fails with status 1: No permissions to create a new namespace"
