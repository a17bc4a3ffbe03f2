"""Responses from which nothing can be learned are an error, or a warning that says what to do."""

import logging
from pathlib import Path
from typing import Any

import lightning
import pytest

from distillkit import DistillData, DistillModule, Sampling, Student
from distillkit.curators.single import DatasetCurator, StudentCurator, TeacherCurator
from distillkit.errors import DataError, GenerationError
from distillkit.generators.transformers import TransformersGenerator
from distillkit.interfaces import Curator, Generator
from distillkit.losses import CrossEntropy
from distillkit.storage.responses import ResponseStore
from distillkit.teachers.transformers import TransformersTeacher
from distillkit.types import Prompts, Response, Row
from helpers.runs import QUIET, save_models, write_prompts


class Silent(Generator):
    """Returns nothing for all prompts, or for all but the first."""

    def __init__(self, speaks_once: bool = False) -> None:
        self.speaks_once = speaks_once

    def refresh(self, model: Any, tokenizer: Any) -> None:
        pass

    def generate(self, prompts: Prompts, sampling: Sampling) -> list[Response]:
        empty = [Response(prompt.id, (), "", "stop") for prompt in prompts]
        spoken = [Response(prompts[0].id, (5, 1), "a", "stop")] if self.speaks_once else empty[:1]
        return spoken + empty[1:]


class NoTokens(DatasetCurator):
    """Rows without anything to train on."""

    def curate(self, prompts: Prompts, generators: Any) -> list[Row]:
        rows = super().curate(prompts, generators)
        return [Row(row.input_ids, (False,) * len(row.input_ids), row.writer, row.prompt_id) for row in rows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("worthless")
    save_models(root)
    write_prompts(root / "train.jsonl", 4, response=True)
    return root


def fit(folder: Path, root: Path, curator: Curator, generator: Generator | None = None) -> DistillModule:
    module = DistillModule(
        Student(str(folder / "student")),
        CrossEntropy(),
        TransformersTeacher(str(folder / "teacher"), dtype="float32"),
        curator,
        generator or TransformersGenerator(progress=False),
    )
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "default_root_dir": root}
    lightning.Trainer(**QUIET, **options).fit(module, DistillData(str(folder / "train.jsonl"), batch_size=2))
    return module


@pytest.mark.parametrize("rounds", ["once", "epoch", "step"])
def test_a_generator_that_returns_nothing_is_an_error(rounds: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        GenerationError, match=r"Silent returned no token for any of \d prompts, as the teacher of round 0"
    ):
        fit(folder, tmp_path, TeacherCurator(rounds=rounds), Silent())
    assert ResponseStore(tmp_path / "responses").shards() == [], "the same command begins anew once it is mended"


def test_some_empty_responses_are_none(folder: Path, tmp_path: Path) -> None:
    assert fit(folder, tmp_path, TeacherCurator(), Silent(speaks_once=True)).trainer.global_step == 2


def test_rows_without_tokens_are_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"None of 4 rows of round 0 \(dataset\) has a token to train on"):
        fit(folder, tmp_path, NoTokens())


def test_it_is_said_that_all_responses_are_cut(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "distillkit"):
        fit(folder, tmp_path, StudentCurator(Sampling(max_new_tokens=1), "step"))
    *_, message = caplog.messages  # the first is about cross-entropy on them
    assert "All 2 responses of the student in round 0 were cut at 1 tokens" in message
    assert "Raise max_new_tokens in the curator's sampling" in message


def test_it_is_not_said_of_some(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "distillkit"):
        fit(folder, tmp_path, TeacherCurator(), Silent(speaks_once=True))
    assert not caplog.messages
