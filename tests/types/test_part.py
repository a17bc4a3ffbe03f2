"""Path objects in the place of text, as programs have them."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from distillkit import DistillData, DistillModule, Student
from distillkit.data import Source
from distillkit.losses import ForwardKL
from distillkit.teachers import TransformersTeacher
from distillkit.types.part import Part, settings_of
from helpers.runs import QUIET, save_models, write_prompts


class Named(Part):
    """A part with text, a list, and a path that it wants as one."""

    def __init__(self, text: str, items: list[str] | None = None, path: Path | None = None, **more: Any) -> None:
        self.text, self.items, self.path, self.more = text, items, path, more


@pytest.mark.parametrize("by_name", [False, True])
def test_a_path_is_its_text_where_text_is_wanted(by_name: bool) -> None:
    path: Any = Path("a/b")
    part = Named(text=path, items=[path, "c"], path=path) if by_name else Named(path, [path, "c"], path)
    assert (part.text, part.items, part.path) == ("a/b", ["a/b", "c"], path)
    assert settings_of(part) == {"text": "a/b", "items": ["a/b", "c"], "path": path}


def test_other_arguments_arrive_as_they_are() -> None:
    items = [1, object()]
    part = Named("t", items, more=items)  # type: ignore[arg-type]
    assert part.items == items
    assert part.more == {"more": items}
    assert part.more["more"] is items


def test_a_run_takes_paths_and_its_checkpoint_has_their_text(tmp_path: Path) -> None:
    teacher, student = map(Path, save_models(tmp_path))
    prompts: Any = Path(write_prompts(tmp_path / "train.jsonl", 2, response=True))
    model = DistillModule(Student(student), ForwardKL(), TransformersTeacher(teacher))  # type: ignore[arg-type]
    assert Source(prompts).paths == [str(prompts)]
    data = DistillData([prompts], val=prompts)
    trainer = lightning.Trainer(**QUIET | {"max_steps": 1, "default_root_dir": tmp_path, "logger": False})
    trainer.fit(model, data)
    assert "PosixPath" not in str(model.hparams)
    again = DistillModule.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)  # type: ignore[union-attr]
    assert again.student_spec.source == str(student)
    assert all(torch.isfinite(weight).all() for weight in again.student.parameters())
