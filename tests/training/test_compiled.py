"""Compiled models train, and generate without their compiled layers."""

from pathlib import Path

import lightning
import pytest

from distillkit import DistillData, DistillModule, Sampling, Student
from distillkit.curators.single import StudentCurator
from distillkit.generators.transformers import TransformersGenerator
from distillkit.losses import ForwardKL
from distillkit.teachers.transformers import TransformersTeacher
from helpers.runs import QUIET, MemoryLogger, save_models, write_prompts


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_run_with_compiled_layers_is_that_without(tmp_path: Path) -> None:
    teacher, student = save_models(tmp_path)
    train, val = (write_prompts(tmp_path / f"{name}.jsonl", 3) for name in ("train", "val"))
    losses, figures = [], []
    for compiled in (False, True):
        module = DistillModule(
            Student(student, compile=compiled),
            ForwardKL(),
            TransformersTeacher(teacher, dtype="float32", compile=compiled),
            StudentCurator(Sampling(temperature=0.0, max_new_tokens=3), "step"),
            TransformersGenerator(progress=False),
            answers=Sampling(temperature=0.0, max_new_tokens=3),
        )
        options = {"max_epochs": 1, "enable_checkpointing": False, "logger": MemoryLogger(), "num_sanity_val_steps": -1}
        trainer = lightning.Trainer(**QUIET | options, default_root_dir=tmp_path / str(compiled))
        trainer.fit(module, DistillData(train, val, batch_size=2))
        losses.append(trainer.logger.column("train/loss"))
        figures.append([row["val/kl"] for row in module.history])
    assert len(losses[0]) == len(figures[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert figures[1] == pytest.approx(figures[0], rel=1e-4)
