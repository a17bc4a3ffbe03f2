"""What the progress bars show."""

import io
import re
import sys
from pathlib import Path
from typing import Any

import lightning
import pytest
import rich
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from rich.console import Console

from distillkit import DistillData, DistillModule, Sampling, Student
from distillkit.callbacks import Throughput
from distillkit.callbacks.progress import shorten
from distillkit.losses import ForwardKL
from distillkit.teachers import TransformersTeacher
from helpers.runs import QUIET, MemoryLogger, save_models, write_prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("progress")
    save_models(root)
    write_prompts(root / "train.jsonl", 4, response=True)
    return root


def fit(folder: Path, root: Path, bar: ProgressBar, **settings: Any) -> MemoryLogger:
    """Two epochs of two steps."""
    module = DistillModule(
        Student(str(folder / "student")),
        ForwardKL(),
        TransformersTeacher(str(folder / "teacher"), dtype="float32"),
        answers=Sampling(temperature=0.0, max_new_tokens=2),
    )
    logger = MemoryLogger()
    options = QUIET | {"enable_progress_bar": True, "enable_checkpointing": False, "max_epochs": 2}
    trainer = lightning.Trainer(
        **options | settings, default_root_dir=root, logger=logger, callbacks=[bar, Throughput()]
    )
    prompts = str(folder / "train.jsonl")
    trainer.fit(module, DistillData(prompts, prompts, batch_size=2))
    return logger


@pytest.mark.parametrize("width", [80, 140])
def test_the_rich_bar_shows_whole_names(width: int, folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    shown = io.StringIO()
    console = Console(file=shown, width=width, height=40, force_terminal=True)
    monkeypatch.setattr(rich, "_console", console)
    monkeypatch.setattr("lightning.pytorch.callbacks.progress.rich_progress.reconfigure", lambda **_: None)
    fit(folder, tmp_path, RichProgressBar())
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue())
    assert "Epoch 1/2" in text
    assert "Epoch 2/2" in text
    for name in ("loss", "kl", "tokens/s", "lr"):
        assert re.search(rf"{name}: [\d,.e-]+\d", text), name
    assert "v_num" not in text
    assert "…" not in text
    lines = [line for line in text.splitlines() if "Epoch 2/2" in line and "loss: " in line]
    assert all(("lr: " in line) == (width == 140) for line in lines)


def test_the_text_bar_shows_whole_names(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda file: (80, 24))
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    fit(folder, tmp_path, TQDMProgressBar())
    lines = [line for line in re.split(r"[\r\n]", shown.getvalue()) if "Epoch 2/2" in line]
    assert max(map(len, lines)) <= 80
    assert re.search(r"2/2 \[00:\d\d<00:00, loss=\d.*, kl=\d.*, tokens/s=\d.*, lr=\d[^,]*\]$", lines[-1])


@pytest.mark.parametrize(
    ("value", "text"), [(0.81783, "0.818"), (1403.81, "1,404"), (1.9339e-05, "1.93e-05"), (0.0, "0"), ("a", "a")]
)
def test_a_metric_is_short(value: object, text: str) -> None:
    assert shorten(value) == text
