"""Held-out answers of teacher and student, side by side."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning import Callback, Trainer
from rich import get_console
from rich.table import Table
from rich.text import Text

from distillkit.errors import check_range, readable
from distillkit.evaluation.examples import examples, read_answers
from distillkit.run_folder import ANSWERS
from distillkit.storage.atomic import write_atomically

if TYPE_CHECKING:
    from distillkit.callbacks.run import RunModule


_IN_TRAINING = 2
"""Limit on the answers that a validation during training prints: a longer table follows when training ends."""


class Answers(Callback):
    """Prints a few held-out answers of teacher and student at each validation, and writes all to `answers.jsonl`.

    When training ends, it prints the student's answers before and after. A run with `fast_dev_run` writes nothing.

    Args:
        shown: Number of prompts in a table on the terminal, at least 0; while training goes on, at most two.
    """

    def __init__(self, shown: int = 5) -> None:
        check_range("Answers.shown", shown, 0)
        self.shown = shown
        self._last_step: int | None = None

    def on_validation_end(self, trainer: Trainer, pl_module: "RunModule") -> None:
        """Prints and writes the answers of the validation."""
        rows, history = pl_module.held_out.table, pl_module.history
        if not trainer.is_global_zero or not rows or not history:
            return
        step = history[-1]["step"]  # of the weights: the trainer has no step outside `fit`
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning sets it through a connector
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            split = "test" if trainer.state.fn == "test" else "val"
            answers = [{"step": int(step), "split": split, **vars(row)} for row in rows]
            self._write(folder / ANSWERS, answers, trainer.state.fn == "fit")
        metrics = {name.rpartition("/")[2]: value for name, value in history[-1].items() if name != "step"}
        title = f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        table = Table("prompt", "reference", "student", title=title, title_justify="left", show_lines=True)
        for row in rows[: min(self.shown, _IN_TRAINING) if trainer.state.fn == "fit" else self.shown]:
            # Text, not strings: rich would take `[b]` for markup, and a terminal an escape sequence for a command.
            table.add_row(*(Text(readable(text)) for text in (row.prompt, row.reference, row.student)))
        get_console().print(table if self.shown else title)

    on_test_end = on_validation_end  # type: ignore[assignment]

    def on_fit_end(self, trainer: Trainer, pl_module: "RunModule") -> None:
        """Prints the reference of a few prompts, and the student's answer before and after training."""
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        table = Table("prompt", "reference", "student before", "student after", show_lines=True)
        for example in examples(Path(trainer.default_root_dir), self.shown):
            texts = (example.prompt, example.reference, example.before, example.after)
            table.add_row(*(Text(readable(text)) for text in texts))
        if table.row_count:
            get_console().print(table)

    def _write(self, path: Path, answers: Sequence[Mapping[str, Any]], is_training: bool) -> None:
        """Adds the answers of a validation, each of which is in the file once.

        The first time, and where a validation is repeated, the file is written anew: without a line that a killed
        process has cut, and without the lines that these replace. While it trains, a run has not reached later steps:
        lines of them are of a process that was killed after its last checkpoint.
        """
        step = answers[0]["step"]
        lines = [json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers]
        if self._last_step is not None and step > self._last_step:
            with path.open("a", encoding="utf-8") as file:
                file.writelines(lines)
        else:
            replaced = {_key(answer) for answer in answers}
            earlier = [
                line
                for line, answer in read_answers(path)
                if _key(answer) not in replaced and not (is_training and answer.get("step", 0) > step)
            ]
            write_atomically(path, "".join([*earlier, *lines]))
        self._last_step = step


def _key(answer: Mapping[str, Any]) -> tuple[object, ...]:
    return answer.get("step"), answer.get("split"), answer.get("prompt_id")
