"""Programs are run, stopped and counted as what they are."""

import logging

import pytest

from distillkit.errors import ConfigError, DataError
from distillkit.testing import check_verifier
from distillkit.testing.verifiers import VerifierContract
from distillkit.types import Prompt, Prompts, Response
from distillkit.verifiers.code import PythonTests, code_of

TESTS = "assert double(2) == 4\nassert double(-1) == -2"


def judged(*texts: str, tests: str = TESTS, **settings: int) -> list[float]:
    numbers = [str(number) for number in range(len(texts))]
    prompts = Prompts(tuple(Prompt(i, ({"role": "user", "content": "?"},), (1,), reference=tests) for i in numbers))
    responses = [Response(i, (1,), text, "stop") for i, text in zip(numbers, texts, strict=True)]
    return PythonTests(allow_execution=True, **settings).verify(prompts, responses)


def test_code_that_passes_the_tests_is_right_and_other_code_is_not() -> None:
    right = "def double(x):\n    return 2 * x"
    fenced = f"Here it is:\n```python\n{right}\n```\nIt doubles."
    assert judged(right, fenced, f"```\n{right}") == [1, 1, 1]
    assert judged("def double(x):\n    return x * x", "no code at all", "def double(x:", "") == [0, 0, 0, 0]


@pytest.mark.parametrize("program", [
    "import sys\nsys.exit(0)", "import os\nos._exit(0)", "raise SystemExit", "quit()",
    "def double(x):\n    return 2 * x\nimport os\nos._exit(0)",
])  # fmt: skip
def test_a_program_that_ends_before_its_tests_has_not_passed_them(program: str) -> None:
    assert judged(program) == [0.0]


def test_a_program_is_stopped_by_time_and_memory() -> None:
    assert judged("while True: pass", "import time\ntime.sleep(30)", timeout=1) == [0.0, 0.0]
    assert judged("double = lambda x: 2 * x\nwaste = bytearray(2**28)", memory=128) == [0.0]
    assert judged("double = lambda x: 2 * x\nwaste = bytearray(2**20)", memory=128) == [1.0]


def test_a_program_sees_no_variable_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "known")
    assert judged("import os", tests="assert 'A_SECRET' not in os.environ\nassert os.listdir() == []") == [1.0]


def test_fenced_blocks_are_joined() -> None:
    assert code_of("a\n```py\nx = 1\n```\nb\n```\ny = 2\n```") == "x = 1\n\n\ny = 2\n"
    assert code_of("x = 1") == "x = 1"


def test_it_is_off_unless_it_is_allowed_and_then_it_warns(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match="with your rights and without a sandbox: set allow_execution to true where"):
        PythonTests()
    with caplog.at_level(logging.WARNING):
        PythonTests(allow_execution=True)
    assert "runs programs that a model wrote, with your rights and without a sandbox" in caplog.text


@pytest.mark.parametrize(("tests", "message"), [("", "has none"), ("assert (", "are no Python")])
def test_a_prompt_without_tests_is_refused(tests: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        judged("x = 1", tests=tests)


@pytest.mark.parametrize("name", ["timeout", "memory", "workers"])
def test_a_number_out_of_range_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"PythonTests\.{name} must be at least \d+, got 0"):
        PythonTests(allow_execution=True, **{name: 0})


def test_it_keeps_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = Prompts(tuple(
        Prompt(str(i), ({"role": "user", "content": "?"},), (1,), reference="x") for i in range(3)
    ))  # fmt: skip
    monkeypatch.setattr(VerifierContract, "prompts", lambda self: prompts)
    texts = ("x = 1", "", "y = 1")
    responses = [Response(str(i), (1,), text, "stop") for i, text in enumerate(texts)]
    monkeypatch.setattr(VerifierContract, "responses", lambda self, own: responses)
    check_verifier(PythonTests(allow_execution=True))
