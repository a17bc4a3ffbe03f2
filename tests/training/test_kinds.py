"""Objects of Python in the place of parts: one line says what is meant."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from distillkit import DistillData, DistillModule, Student
from distillkit.curators import ReplayCurator, StudentCurator
from distillkit.errors import ConfigError, ModelError, PluginError
from distillkit.interfaces import Schedule
from distillkit.losses import CrossEntropy, DistiLLM2, ForwardKL
from distillkit.testing import BigramTeacher
from distillkit.types import Progress
from helpers.models import save_tiny
from helpers.runs import QUIET, write_prompts

WRONG = {
    "a module": ({"student": nn.Module()}, r"student must be a Student, got Module: a Student names the model"),
    "a path": ({"student": "./student"}, r"student must be a Student, got './student': .* as Student\('./student'\)"),
    "a class": ({"student": Student}, r"student must be a Student, got the class Student"),
    "a loss of torch": (
        {"loss": nn.KLDivLoss()},
        r"loss must be a Loss, got KLDivLoss: take one of ",
    ),
    "a model as teacher": ({"teacher": nn.Linear(1, 1)}, r"teacher must be a Teacher, got Linear"),
    "answers as a dict": ({"answers": {"temperature": 0.0}}, r"answers must be a Sampling, .* got dict"),
    "an optimizer that is made": (
        {"optimizer": torch.optim.SGD([torch.zeros(1, requires_grad=True)])},
        r"optimizer must be a class or a function, such as .* got SGD",
    ),
    "an optimizer's name": ({"optimizer": "AdamW"}, r"optimizer must be a class or a function, .* got 'AdamW'"),
    "a shape that is unknown": (
        {"lr_schedule": "cosin"},
        r"lr_schedule must be one of constant, linear, cosine, or .* got 'cosin'",
    ),
    "a sampling as a dict": (
        {"loss": CrossEntropy(), "curator": StudentCurator(sampling={"max_new_tokens": 4})},  # type: ignore[arg-type]
        r"The sampling of StudentCurator must be a Sampling, got dict",
    ),
    "a name": ({"curator": "TeacherCurator"}, r"curator must be a Curator, got 'TeacherCurator'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_object_that_is_no_part_is_named(name: str) -> None:
    settings, words = WRONG[name]
    with pytest.raises(ConfigError, match=words) as caught:
        DistillModule(**{"student": Student("./student"), "loss": ForwardKL(), **settings})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([{"prompt": "a"}], "a list with a dict"),
        ({"prompt": ["a"]}, "a dict"),
        (DataLoader([1]), "a DataLoader"),
    ],
)
@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_what_names_no_prompts_is_one_line(name: str, value: Any, words: str) -> None:
    message = rf"^DistillData\.{name} must be the path of a file, a list of these, or a source, got {words}\. Wri"
    with pytest.raises(ConfigError, match=message):
        DistillData(**{"train": "prompts.jsonl", name: value})


class Plain(Schedule):
    """A schedule whose value is whatever it is constructed with."""

    def __init__(self, number: Any) -> None:
        super().__init__()
        self.number = number

    @property
    def value(self) -> Any:
        return self.number

    def update(self, progress: Progress, metrics: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("value", "words"), [(0.5, r"got the float 0\.5"), (1, r"got the int 1"), (torch.ones(2), r"got shape \[2\]")]
)
@pytest.mark.parametrize("holder", ["loss", "curator"])
def test_a_value_that_is_no_tensor_is_one_line(value: Any, words: str, holder: str) -> None:
    schedule: Any = Plain(value)
    parts: dict[str, Any] = (
        {"loss": DistiLLM2(beta=schedule)}
        if holder == "loss"
        else {"loss": ForwardKL(), "curator": ReplayCurator(StudentCurator(), replay=schedule)}
    )
    with pytest.raises(PluginError, match=rf"^Plain\.value must be a 0-dim tensor, {words}: keep it in a buffer"):
        DistillModule(Student("./student"), teacher=BigramTeacher(seed=1), **parts)


class Headed(Student):
    """A student whose output embedding is two modules."""

    def load(self) -> Any:
        model = super().load()
        model.lm_head = nn.Sequential(model.lm_head, nn.Identity())
        return model


def fit(student: Student, root: Path, data: Any) -> None:
    options = QUIET | {"max_steps": 1, "default_root_dir": root, "logger": False, "enable_checkpointing": False}
    lightning.Trainer(**options).fit(DistillModule(student, CrossEntropy()), data)


def test_a_head_of_several_modules_is_one_line(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "train.jsonl", 2, response=True)
    with pytest.raises(ModelError, match=r"output embedding of LlamaForCausalLM is Sequential, which has no weight"):
        fit(Headed(str(save_tiny(tmp_path / "student"))), tmp_path, DistillData(prompts))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`", "ignore:.*does not have many workers")
@pytest.mark.parametrize("items", [[torch.zeros(2)] * 2, [{"input_ids": torch.zeros(2)}] * 2], ids=["tensors", "dicts"])
def test_a_plain_loader_is_one_line(items: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"The data loader yields \w+, not a Batch: use DistillData"):
        fit(Student(str(save_tiny(tmp_path / "student"))), tmp_path, DataLoader(items))
