"""Programs are run, stopped and counted as what they are."""

import logging

import pytest

from distillkit.errors import ConfigError, DataError
from distillkit.testing import check_verifier
from distillkit.testing.verifiers import VerifierContract
from distillkit.types import Prompt, Prompts, Response
from distillkit.verifiers import sandbox
from distillkit.verifiers.code import PythonTests

TESTS = "assert double(2) == 4\nassert double(-1) == -2"
RIGHT = "def double(x):\n    return 2 * x"


@pytest.fixture(autouse=True)
def _consent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLKIT_ALLOW", "code")


def judged(*texts: str, tests: str = TESTS, **settings: int | str) -> list[float]:
    numbers = [str(number) for number in range(len(texts))]
    prompts = Prompts(tuple(Prompt(i, ({"role": "user", "content": "?"},), (1,), reference=tests) for i in numbers))
    responses = [Response(i, (1,), text, "stop") for i, text in zip(numbers, texts, strict=True)]
    return PythonTests(allow_execution=True, **settings).verify(prompts, responses)


def test_code_that_passes_the_tests_is_right_and_other_code_is_not() -> None:
    fenced = f"Here it is:\n```python\n{RIGHT}\n```\nIt doubles."
    assert judged(RIGHT, fenced, f"```\n{RIGHT}") == [1, 1, 1]
    wrong = ("def double(x):\n    return x * x", "no code at all", "def double(x:", "", "```bash\nls\n```")
    assert judged(*wrong) == [0, 0, 0, 0, 0]


RUN = {
    "a main guard that reads input": f"{RIGHT}\n\nif __name__ == '__main__':\n    print(double(int(input())))",
    "an example that reads input": f"```python\n{RIGHT}\n```\n```python\nprint(double(int(input())))\n```",
    "an example that fails": f"```python\n{RIGHT}\n```\n```python\ndouble(None) + 1\n```",
    "a wrong block and its correction": f"```python\ndef double(x):\n    retrun x\n```\n```python\n{RIGHT}\n```",
    "a correction that replaces": f"```python\ndef double(x):\n    return x\n```\n```python\n{RIGHT}\n```",
    "a bash block before": f"```bash\npip install double\n```\n```python\n{RIGHT}\n```",
    "lines as Windows ends them": f"```python\n{RIGHT}\n```".replace("\n", "\r\n"),
    "reasoning before": f"<think>```python\ndef double(x): return x\n```</think>\n```python3\n{RIGHT}\n```",
}


@pytest.mark.parametrize("kind", RUN)
def test_right_code_is_right_however_it_is_presented(kind: str) -> None:
    assert judged(RUN[kind]) == [1.0]


@pytest.mark.parametrize(
    "program",
    [
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "raise SystemExit",
        "quit()",
        "def double(x):\n    return 2 * x\nimport os\nos._exit(0)",
    ],
)
def test_a_program_that_ends_before_its_tests_has_not_passed_them(program: str) -> None:
    assert judged(program) == [0.0]


def test_a_program_is_stopped_by_time_and_memory() -> None:
    assert judged("while True: pass", "import time\ntime.sleep(30)", timeout=1) == [0.0, 0.0]
    assert judged("double = lambda x: 2 * x\nwaste = bytearray(2**28)", memory=128) == [0.0]
    assert judged("double = lambda x: 2 * x\nwaste = bytearray(2**20)", memory=128) == [1.0]


def test_a_program_sees_no_variable_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "known")
    program = "import os\ndef look():\n    return dict(os.environ), os.listdir()"
    assert judged(program, tests="names, files = look()\nassert 'A_SECRET' not in names\nassert files == []") == [1.0]


def test_it_is_off_unless_it_is_allowed_and_says_if_there_is_no_sandbox(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"runs generated programs\. Set PythonTests\.allow_execution"):
        PythonTests()
    with caplog.at_level(logging.WARNING):
        PythonTests(allow_execution=True, sandbox="none")
    assert "runs generated programs with your permissions and without a sandbox" in caplog.text


def test_without_a_sandbox_it_needs_a_consent_that_no_file_can_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISTILLKIT_ALLOW")
    with pytest.raises(ConfigError, match=r"without a sandbox\. .* set the environment variable DISTILLKIT_ALLOW=code"):
        PythonTests(allow_execution=True, sandbox="none")
    monkeypatch.setattr(sandbox, "bubblewrap_problem", lambda: "bwrap is not installed")
    with pytest.raises(ConfigError, match=r"without a sandbox \(bwrap is not installed\)\. .* DISTILLKIT_ALLOW=code"):
        PythonTests(allow_execution=True)
    monkeypatch.setattr(sandbox, "bubblewrap_problem", str)
    PythonTests(allow_execution=True)


def test_a_sandbox_that_is_required_and_missing_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sandbox, "bubblewrap_problem", lambda: "bwrap is not installed")
    with pytest.raises(
        ConfigError, match=r"bubblewrap is required and does not work \(bwrap is not installed\): install"
    ):
        PythonTests(allow_execution=True, sandbox="bubblewrap")
    with caplog.at_level(logging.WARNING):
        assert judged(RIGHT) == [1.0]
    assert "without a sandbox (bwrap is not installed)" in caplog.text


VACUOUS = "def check(candidate):\n    assert candidate(2) == 4\n\nMETADATA = {'author': 'x'}"


@pytest.mark.parametrize(
    ("tests", "message"), [("", "has none"), ("assert (", "are not valid Python"), (VACUOUS, "test nothing")]
)
def test_a_prompt_without_tests_is_refused(tests: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        judged("x = 1", tests=tests)


@pytest.mark.parametrize("name", ["timeout", "memory", "workers"])
def test_a_number_out_of_range_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"PythonTests\.{name} must be at least \d+, got 0"):
        PythonTests(allow_execution=True, **{name: 0})


def test_it_keeps_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = Prompts(
        tuple(Prompt(str(i), ({"role": "user", "content": "?"},), (1,), reference="assert x") for i in range(3))
    )
    monkeypatch.setattr(VerifierContract, "prompts", lambda self: prompts)
    texts = ("x = 1", "", "y = 1")
    responses = [Response(str(i), (1,), text, "stop") for i, text in enumerate(texts)]
    monkeypatch.setattr(VerifierContract, "responses", lambda self, own: responses)
    check_verifier(PythonTests(allow_execution=True))
