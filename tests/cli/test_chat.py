"""`distillkit chat`: a student beside its teacher, through a pipe and on a terminal."""

import io
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distillkit import DistillData, DistillModule, Student
from distillkit.callbacks import RunCheckpoint
from distillkit.cli.main import main
from distillkit.errors import readable
from distillkit.losses import ForwardKL
from distillkit.teachers.transformers import TransformersTeacher
from distillkit.workflows.chat import Subject, find_subject, load_speakers
from distillkit.workflows.student_export import export
from helpers.models import save_tiny, tiny_tokenizer
from helpers.runs import QUIET, save_models, write_prompts

SYSTEM = "Be brief."


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a system message, in `run`, and its export, in `out`."""
    folder = tmp_path_factory.mktemp("chat")
    save_models(folder)
    rows = write_prompts(folder / "train.jsonl", 4, response=True)
    teacher = TransformersTeacher(str(folder / "teacher"), dtype="float32")
    module = DistillModule(Student(str(folder / "student")), ForwardKL(), teacher, export=False)
    options = QUIET | {"max_epochs": 1, "default_root_dir": folder / "run", "logger": False}
    data = DistillData(rows, system=SYSTEM, batch_size=4)
    lightning.Trainer(**options, callbacks=[RunCheckpoint()]).fit(module, data)
    export(folder / "run", folder / "out")
    return folder


@pytest.fixture
def say(monkeypatch: Any) -> Any:
    def say(text: str) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))

    return say


def greedy(folder: Path, conversation: list[dict[str, str]], count: int) -> str:
    """The most likely tokens, by transformers alone."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**inputs, max_new_tokens=count, do_sample=False)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def shown(text: str) -> str:
    """A text as a terminal shows it, with escapes for control characters."""
    return "\n".join(readable(line) for line in text.split("\n")).strip()


def test_a_pipe_gets_the_answers_alone(root: Path, say: Any, capsys: pytest.CaptureFixture[str]) -> None:
    say("Hi\n\n")
    assert main(["chat", str(root / "out"), "--max-new-tokens", "8"]) == 0
    conversation = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Hi"}]
    output = capsys.readouterr().out
    assert output.strip() == shown(greedy(root / "out", conversation, 8))
    assert output.endswith("\n")


def test_a_run_answers_beside_its_teacher_each_in_its_own_conversation(
    root: Path, say: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    say("Hi\nAnd you?\n/new\nHi\n/quit\nnever\n")
    assert main(["chat", str(root / "run"), "--max-new-tokens", "5"]) == 0
    answers = capsys.readouterr().out.split("student: ")[1:]
    assert len(answers) == 3
    assert all(answer.count("teacher: ") == 1 for answer in answers)
    assert answers[0] == answers[2], "greedy, in a new conversation"
    student, teacher = answers[0].split("teacher: ")
    assert student.strip() != teacher.strip()
    conversation = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Hi"}]
    assert teacher.strip() == shown(greedy(root / "teacher", conversation, 5))


def test_the_second_message_follows_the_first_answer(root: Path) -> None:
    (speaker,) = load_speakers(find_subject(str(root / "out")))
    pieces: list[str] = []
    speaker.answer("Hi", 6, 0.0, pieces.append)
    first = speaker.messages[-1]["content"]
    speaker.answer("And you?", 6, 0.0, pieces.append)
    assert [message["role"] for message in speaker.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert speaker.messages[-1]["content"] == greedy(root / "out", speaker.messages[:-1], 6)
    assert speaker.messages[2]["content"] == first


def test_the_teacher_and_the_system_message_are_a_choice(
    root: Path, say: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    say("Hi\n")
    options = ["--max-new-tokens", "3", "--system", ""]
    assert main(["chat", str(root / "run"), *options, "--no-teacher"]) == 0
    assert capsys.readouterr().out.strip() == shown(greedy(root / "out", [{"role": "user", "content": "Hi"}], 3))
    say("Hi\n")
    assert main(["chat", str(root / "out"), *options, "--teacher", str(root / "teacher")]) == 0
    assert "teacher: " in capsys.readouterr().out
    say("Hi\n")
    assert main(["chat", str(root / "out"), *options, "--teacher", str(root / "none")]) == 1
    assert "none does not exist" in capsys.readouterr().err


def test_a_teacher_that_is_gone_is_left_out_and_said(root: Path, say: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "teacher").rename(root / "hidden")
    try:
        say("Hi\n")
        assert main(["chat", str(root / "run"), "--max-new-tokens", "3"]) == 0
    finally:
        (root / "hidden").rename(root / "teacher")
    done = capsys.readouterr()
    assert "teacher: " not in done.out
    assert "Without the teacher:" in done.err


def test_the_newest_student_of_a_run_is_taken(root: Path) -> None:
    saved = root / "run" / "checkpoints" / "step=0000001.ckpt"
    assert find_subject(str(root / "run")).checkpoint == saved
    assert find_subject(str(saved)).checkpoint == saved
    (root / "run" / "config.yaml").write_text("data: {system: Short}\nmodel: {teacher: null}\n")
    finished = root / "run" / "export"
    export(saved, finished)
    try:
        assert find_subject(str(root / "run")) == find_subject(str(finished))
        assert find_subject(str(finished)) == Subject(str(finished), None, None, "Short", True)
        os.utime(saved)
        assert find_subject(str(root / "run")).checkpoint == saved
    finally:
        (root / "run" / "config.yaml").unlink()
        finished.rename(root / "finished")


def test_a_model_without_a_template_continues_plain_text(
    tmp_path: Path, say: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, tokenizer = save_tiny(tmp_path / "base"), tiny_tokenizer()
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    say("The capital of\n")
    assert main(["chat", str(folder), "--max-new-tokens", "4"]) == 0
    model, ids = AutoModelForCausalLM.from_pretrained(folder), tokenizer("The capital of", return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=4, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert capsys.readouterr().out.strip() == shown(tokenizer.decode(expected, skip_special_tokens=True))
    say("Hi\n")
    assert main(["chat", str(folder), "--system", "Be nice."]) == 1
    assert "--system needs a chat template" in capsys.readouterr().err


def test_a_conversation_beyond_the_context_is_one_line(
    tmp_path: Path, say: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny(tmp_path / "short", max_position_embeddings=24)
    say("very " * 40)
    assert main(["chat", str(folder)]) == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("distillkit chat: error: The conversation has ")
    assert last.endswith("and the student reads 24: /new starts anew.")


def test_control_characters_of_an_answer_are_shown_as_escapes(root: Path) -> None:
    (speaker,) = load_speakers(find_subject(str(root / "out")))
    escape = speaker.tokenizer.encode("\x1b[2J", add_special_tokens=False)
    from distillkit.workflows.chat import _Stream

    pieces: list[str] = []
    stream = _Stream(speaker.tokenizer, pieces.append, ())
    for ids in ([1, 2], *[[token] for token in escape]):
        stream.put(torch.tensor(ids))
    stream.end()
    assert "".join(pieces) == "\\x1b[2J"


class Terminal(io.StringIO):
    """Standard input that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: Any) -> Iterator[Any]:
    """Has the command read these lines from a terminal; an exception among them is raised."""

    def type_in(*lines: Any) -> None:
        remaining = iter(lines)

        def read(prompt: str) -> str:
            line = next(remaining, EOFError())
            if callable(line):
                line()
            if isinstance(line, EOFError):
                raise line
            return str(line)

        monkeypatch.setattr("sys.stdin", Terminal())
        monkeypatch.setattr("builtins.input", read)

    return type_in


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)  # the handler raises here


def test_a_terminal_is_told_who_answers_and_how_to_end(
    root: Path, terminal: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal("Hi", interrupt)
    assert main(["chat", str(root / "run"), "--max-new-tokens", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        f"student  {root / 'run' / 'checkpoints' / 'step=0000001.ckpt'}",
        f"teacher  {root / 'teacher'}",
        f"system   {SYSTEM}",
        "/new starts a new conversation, /quit or Ctrl-D ends, Ctrl-C stops an answer.",
    ]
    assert lines.count(lines[3]) == 2, "Ctrl-C beside an answer says it again"


def test_ctrl_c_stops_an_answer_and_not_the_chat(root: Path, terminal: Any, capsys: pytest.CaptureFixture[str]) -> None:
    class Question(str):
        def __call__(self) -> None:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()

    terminal(Question("Hi"), "/quit")
    folder = save_tiny(root / "endless", max_position_embeddings=100_000)
    assert main(["chat", str(folder), "--max-new-tokens", "90000"]) == 0
    assert " [stopped]\n" in capsys.readouterr().out
