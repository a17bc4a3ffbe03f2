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
