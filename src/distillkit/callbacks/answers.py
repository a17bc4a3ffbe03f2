"""Held-out answers side by side."""

import json
from pathlib import Path
from typing import Any

from lightning import Callback
from rich import get_console
from rich.table import Table

from distillkit.errors import ConfigError


class Answers(Callback):
    """Shows a few held-out answers of teacher and student at each validation, and writes all to `answers.jsonl`.

    Args:
        shown: Answers in the table on the terminal, at least 0.
    """

    def __init__(self, shown: int = 4) -> None:
        if shown < 0:
            raise ConfigError(f"Answers.shown must be at least 0, got {shown}.")
        self.shown = shown

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """After each validation."""
        rows, history = pl_module.held_out.table, pl_module.history
        if not trainer.is_global_zero or not rows or not history:
            return
        step = int(history[-1]["step"])
        step = history[-1]["step"]  # that of the weights: the trainer knows none outside `fit`
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "answers.jsonl").open("a") as file:
            for row in rows:
                file.write(json.dumps({"step": step, **vars(row)}, ensure_ascii=False) + "\n")
        figures = {name.rpartition("/")[2]: value for name, value in history[-1].items() if name != "step"}
        title = f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
        table = Table("prompt", "reference", "student", title=title, title_justify="left", show_lines=True)
        for row in rows[: self.shown]:
            table.add_row(row.prompt, row.reference, row.student)
        get_console().print(table if self.shown else title)

    on_test_end = on_validation_end
