"""The table of answers."""

import io
from types import SimpleNamespace

import pytest
import rich
from rich.console import Console

from distillkit.callbacks import Answers
from distillkit.evaluation.heldout import Answer

TEXTS = ["[/INST]", "[b]bold[/b]", "[/etc/hosts]", "[link=http://x]y[/link]", "\x1b[31mred\x1b[0m", "two\nlines", ""]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_printed_as_it_is(text, tmp_path, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(rich, "_console", Console(file=shown, width=200))
    state = SimpleNamespace(fn="fit")
    trainer = SimpleNamespace(is_global_zero=True, default_root_dir=str(tmp_path), state=state, fast_dev_run=False)
    module = SimpleNamespace(
        held_out=SimpleNamespace(table=[Answer(text, text, text)]), history=[{"step": 3, "val/kl": 1.0}]
    )
    Answers().on_validation_end(trainer, module)
    assert "\x1b" not in shown.getvalue()
    for line in text.splitlines():
        assert shown.getvalue().count(line.replace("\x1b", "\\x1b")) == 3


def test_the_end_of_training_shows_the_answers_before_and_after(tmp_path, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(rich, "_console", Console(file=shown, width=200))
    trainer = SimpleNamespace(
        is_global_zero=True, default_root_dir=str(tmp_path), state=SimpleNamespace(fn="fit"), fast_dev_run=False
    )
    answers = Answers()
    for step, text in ((0, "early"), (4, "middle"), (8, "late")):
        table = [Answer(f"prompt {i}", f"reference {i}", f"{text} {i}", prompt_id=str(i)) for i in range(7)]
        module = SimpleNamespace(held_out=SimpleNamespace(table=table), history=[{"step": step, "val/kl": 1.0}])
        answers.on_validation_end(trainer, module)
        assert shown.getvalue().count(text) == 2
    shown.truncate(0)
    answers.on_fit_end(trainer, module)
    rows = [line for line in shown.getvalue().splitlines() if "│ reference" in line]
    assert len(rows) == 5
    assert all(part in rows[0] for part in ("prompt 0", "reference 0", "early 0", "late 0"))
