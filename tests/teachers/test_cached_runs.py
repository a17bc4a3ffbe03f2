"""Whole runs with a teacher whose scores are kept."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from distillkit import DistillData, DistillModule, Sampling, Student
from distillkit.curators.paired import PairedCurator
from distillkit.curators.single import StudentCurator, TeacherCurator
from distillkit.generators.transformers import TransformersGenerator
from distillkit.losses import SkewKL
from distillkit.teachers.cached import CachedTeacher
from helpers.runs import QUIET, MemoryLogger, save_models, write_prompts
from helpers.scores import Counting, Unloadable, only_folder

SHORT = Sampling(max_new_tokens=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    save_models(root)
    write_prompts(root / "train.jsonl", 5)
    write_prompts(root / "val.jsonl", 2)
    return root


def run(folder: Path, root: Path, teacher: Any) -> tuple[DistillModule, MemoryLogger]:
    """Two epochs of three steps, on responses that teacher and student write each epoch."""
    logger = MemoryLogger()
    module = DistillModule(
        Student(str(folder / "student")),
        SkewKL(),
        teacher,
        PairedCurator(TeacherCurator(SHORT), StudentCurator(SHORT, "epoch")),
        TransformersGenerator(progress=False),
        answers=Sampling(temperature=0.0, max_new_tokens=4),
        store=str(folder / "responses" / type(teacher).__name__),
    )
    options = QUIET | {"max_epochs": 2, "default_root_dir": root, "logger": logger, "num_sanity_val_steps": -1}
    trainer = lightning.Trainer(**options, enable_checkpointing=False)
    trainer.fit(module, DistillData(str(folder / "train.jsonl"), str(folder / "val.jsonl"), batch_size=2))
    return module, logger


def test_a_run_with_kept_scores_is_the_run_with_a_live_teacher(folder: Path, tmp_path: Path) -> None:
    live, live_log = run(folder, tmp_path / "live", Counting(str(folder / "teacher")))
    teacher = CachedTeacher(Counting(str(folder / "teacher")))
    cached, log = run(folder, tmp_path / "cached", teacher)
    assert len(log.column("train/loss")) == 6
    # Kept rows were scored in other batches: alike up to rounding.
    assert log.column("train/loss") == pytest.approx(live_log.column("train/loss"), rel=1e-5)
    for ours, theirs in zip(cached.history, live.history, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    keys = teacher.teacher.keys
    assert len(keys) == len(set(keys)), "no row is scored twice"
    assert teacher.teacher.model is None

    again = CachedTeacher(Unloadable(str(folder / "teacher")), folder=only_folder())
    same, same_log = run(folder, tmp_path / "again", again)
    assert same.history == cached.history
    assert same_log.column("train/loss") == log.column("train/loss")
    for name, value in cached.student.state_dict().items():
        assert torch.equal(same.student.state_dict()[name], value), name
