"""Rows that a curator of one's own gets wrong are one line; nothing is trained on another prompt's responses."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning
import pytest

from distillkit import DistillData, DistillModule, Student
from distillkit.curators import DatasetCurator
from distillkit.errors import PluginError
from distillkit.losses import CrossEntropy
from distillkit.types import Prompts, Row
from helpers.models import save_tiny
from helpers.runs import QUIET, write_prompts


class Changed(DatasetCurator):
    """The data's responses, with their rows changed by a function."""

    def __init__(self, change: Callable[[list[Row]], Sequence[Row]]) -> None:
        super().__init__()
        self.change = change

    def curate(self, prompts: Prompts, generators: Any) -> Sequence[Row]:
        return self.change(list(super().curate(prompts, generators)))


def shorter(rows: list[Row]) -> list[Row]:
    return [dataclasses.replace(row, response_mask=row.response_mask[1:]) for row in rows]


def from_the_first(rows: list[Row]) -> list[Row]:
    return [dataclasses.replace(row, response_mask=(True,) * len(row.input_ids)) for row in rows]


WRONG = {
    "no rows": (lambda rows: [], r"returned 0 rows for 4 prompts: every prompt needs the same number"),
    "a row dropped": (lambda rows: rows[1:], r"returned 3 rows for 4 prompts: .* stays, with a response_mask that is"),
    "one pass after another": (lambda rows: rows * 2, r"returned rows 0 to 1 for 2 prompts: the 2 rows of a prompt"),
    "a shorter mask": (shorter, r"returned row 0 with (\d+) tokens and a response_mask of \d+: it needs one value"),
    "a mask from the first token": (from_the_first, r"returned row 0 .* and False at the first"),
}


def fit(change: Callable[[list[Row]], Sequence[Row]], root: Path) -> None:
    options = QUIET | {"max_steps": 1, "default_root_dir": root, "logger": False, "enable_checkpointing": False}
    student = Student(str(save_tiny(root / "student")))
    data = DistillData(write_prompts(root / "train.jsonl", 4, response=True), batch_size=4)
    lightning.Trainer(**options).fit(DistillModule(student, CrossEntropy(), curator=Changed(change)), data)


@pytest.mark.parametrize("name", WRONG)
def test_rows_that_do_not_fit_the_prompts_are_one_line(name: str, tmp_path: Path) -> None:
    change, words = WRONG[name]
    with pytest.raises(PluginError, match=rf"^Changed\.curate {words}"):
        fit(change, tmp_path)


def test_two_rows_of_a_prompt_side_by_side_are_trained_on(tmp_path: Path) -> None:
    fit(lambda rows: [row for row in rows for _ in range(2)], tmp_path)
