"""The module and the command in whole runs of tiny models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from distillkit import DistillData, DistillModule, Lora, Sampling, Student
from distillkit.callbacks import RunCheckpoint
from distillkit.curators.paired import PairedCurator
from distillkit.curators.single import DatasetCurator, StudentCurator, TeacherCurator
from distillkit.errors import ConfigError, DataError, ModelError
from distillkit.generators.transformers import TransformersGenerator
from distillkit.interfaces import Schedule
from distillkit.losses import CrossEntropy, DistiLLM2, ForwardKL, WeightedSum
from distillkit.teachers.transformers import TransformersTeacher
from distillkit.types import Progress, Summary
from helpers.models import save_tiny, tiny_model, tiny_tokenizer
from helpers.runs import QUIET, MemoryLogger, save_models, write_prompts

SHORT = Sampling(max_new_tokens=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("module")
    save_models(root)
    write_prompts(root / "train.jsonl", 4, response=True)
    write_prompts(root / "val.jsonl", 3, response=True)
    return root


def built(
    folder: Path, student: Student | None = None, teacher: str | None = "teacher", **settings: Any
) -> DistillModule:
    """A module on the tiny models."""
    return DistillModule(
        student or Student(str(folder / "student")),
        settings.pop("loss", None) or DistiLLM2(),
        None if teacher is None else TransformersTeacher(str(folder / teacher), dtype="float32"),
        settings.pop("curator", None) or PairedCurator(TeacherCurator(SHORT), StudentCurator(SHORT)),
        TransformersGenerator(progress=False),
        answers=Sampling(temperature=0.0, max_new_tokens=4),
        **settings,
    )


def fit(folder: Path, root: Path, module: DistillModule, **settings: Any) -> lightning.Trainer:
    """One epoch of two steps."""
    options = QUIET | {"max_epochs": 1, "default_root_dir": root, "logger": False, "num_sanity_val_steps": 0} | settings
    trainer = lightning.Trainer(**options, callbacks=[RunCheckpoint()])
    trainer.fit(module, DistillData(str(folder / "train.jsonl"), str(folder / "val.jsonl"), batch_size=2))
    return trainer


def checkpoint(root: Path) -> dict[str, Any]:
    return torch.load(root / "checkpoints" / "last.ckpt")


def test_the_teacher_is_neither_in_the_checkpoint_nor_in_the_optimizer(folder: Path, tmp_path: Path) -> None:
    module = built(folder)
    trainer = fit(folder, tmp_path, module)
    saved = checkpoint(tmp_path)
    expected = {f"student.{name}" for name in module.student.state_dict()}
    assert {name for name in saved["state_dict"] if not name.startswith("loss.")} == expected
    trained = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in module.student.parameters()}
    assert len(saved["optimizer_states"][0]["state"]) == len(trained) > 0
    assert not any(p.requires_grad for p in module.teacher.model.parameters())


def test_with_lora_only_the_adapters_are_saved_and_they_load(folder: Path, tmp_path: Path) -> None:
    lora = Lora(r=2)
    module = built(folder, Student(str(folder / "student"), lora=lora))
    fit(folder, tmp_path, module)
    names = [name for name in checkpoint(tmp_path)["state_dict"] if name.startswith("student.")]
    assert names
    assert all("lora_" in name for name in names), "tied weights have a second name"
    again = built(folder, Student(str(folder / "student"), lora=lora))
    trainer = lightning.Trainer(**QUIET, default_root_dir=tmp_path, logger=False, callbacks=[RunCheckpoint()])
    figures = trainer.validate(again, datamodule=data(folder), ckpt_path="last", verbose=False)
    assert figures[0]["val/kl"] == pytest.approx(module.history[-1]["val/kl"], rel=1e-6)
    for name, value in module.student.state_dict().items():
        assert torch.equal(again.student.state_dict()[name], value)


def data(folder: Path) -> DistillData:
    return DistillData(str(folder / "train.jsonl"), str(folder / "val.jsonl"), batch_size=2)


def test_a_checkpoint_of_another_student_is_refused(folder: Path, tmp_path: Path) -> None:
    fit(folder, tmp_path, built(folder, Student(str(folder / "student"), lora=Lora(r=2, target_modules=["q_proj"]))))
    other = built(folder, Student(str(folder / "student"), lora=Lora(r=2)))
    trainer = lightning.Trainer(**QUIET, default_root_dir=tmp_path, logger=False, callbacks=[RunCheckpoint()])
    with pytest.raises(ModelError, match=r"lacks \d+ of the \d+ trained weights, such as student\..*lora_"):
        trainer.validate(other, datamodule=data(folder), ckpt_path="last")


HELD_OUT = ["val/acceptance", "val/gold_nll", "val/gold_rouge_l", "val/kl", "val/nll", "val/rouge_l"]
"""Metrics of a run whose loss contrasts responses of teacher and student."""


def test_figures_before_training_are_logged_at_step_0(folder: Path, tmp_path: Path) -> None:
    module, logger = built(folder), MemoryLogger()
    fit(folder, tmp_path, module, logger=logger, num_sanity_val_steps=-1)
    held_out = [(step, figures) for step, figures in logger.rows if "val/kl" in figures]
    assert held_out[0][0] == 0
    assert set(held_out[0][1]) == {*HELD_OUT}
    assert [row["step"] for row in module.history] == [0, 2]
    assert len(held_out) == 2


class Watching(Schedule):
    """Keeps the names of what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[int, list[str]]] = []

    @property
    def value(self) -> torch.Tensor:
        return torch.tensor(0.1)

    def update(self, progress: Progress, metrics: Mapping[str, Summary]) -> None:
        self.told.append((progress.step, sorted(metrics)))


def test_schedules_are_told_of_each_step_and_of_each_validation(folder: Path, tmp_path: Path) -> None:
    beta = Watching()
    fit(folder, tmp_path, built(folder, loss=WeightedSum([DistiLLM2(beta=beta)], [1.0])), num_sanity_val_steps=-1)
    steps = [step for step, names in beta.told if names != HELD_OUT and names]
    validations = [step for step, names in beta.told if names == HELD_OUT]
    assert (steps, validations) == ([1, 2], [0, 2])


def test_a_sanity_check_of_a_few_batches_logs_nothing(folder: Path, tmp_path: Path) -> None:
    module = built(folder)
    fit(folder, tmp_path, module, num_sanity_val_steps=1)
    assert [row["step"] for row in module.history] == [2]


def test_supervised_fine_tuning_needs_no_teacher(folder: Path, tmp_path: Path) -> None:
    module = built(folder, teacher=None, loss=CrossEntropy(), curator=DatasetCurator())
    before = Student(str(folder / "student")).load().state_dict()
    fit(folder, tmp_path, module, num_sanity_val_steps=-1)
    assert set(module.history[-1]) == {"step", "val/loss", "val/nll", "val/rouge_l"}
    assert module.history[1]["val/nll"] < module.history[0]["val/nll"]
    assert any(not torch.equal(before[name], value) for name, value in module.student.state_dict().items())
    assert not (tmp_path / "responses").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss": ForwardKL()}, "model.teacher is missing: ForwardKL needs one"),
        ({"loss": CrossEntropy(), "curator": TeacherCurator()}, "model.teacher is missing: TeacherCurator needs one"),
        ({"loss": CrossEntropy(), "curator": PairedCurator()}, "model.teacher is missing: PairedCurator needs one"),
        (
            {"loss": CrossEntropy(), "warmup": 1.0, "curator": DatasetCurator()},
            r"warmup must lie in \[0, 1\), .* got 1\.0",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(settings: Any, words: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        built(folder, teacher=None, **settings)


def test_validation_without_prompts_is_refused(folder: Path, tmp_path: Path) -> None:
    trainer = lightning.Trainer(**QUIET, default_root_dir=tmp_path, logger=False)
    with pytest.raises(DataError, match=r"data\.val is missing: there are no prompts"):
        trainer.validate(built(folder), datamodule=DistillData(str(folder / "train.jsonl")))


def test_wider_logits_are_cut_to_the_shared_tokens_and_it_is_said_once(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = tmp_path / "wide"
    tiny_model(336, seed=2).save_pretrained(wide)
    tiny_tokenizer().save_pretrained(wide)
    module = built(folder, Student(str(wide)))
    fit(folder, tmp_path, module, num_sanity_val_steps=-1)
    width = module.teacher.vocab_size
    assert capsys.readouterr().out.count(f"has 336 logits and the teacher {width}: both are cut to {width}") == 1
    batch = next(iter(module.trainer.datamodule.train_dataloader()))
    student, teacher = module.score(batch)
    assert student.log_probs().shape == teacher.log_probs().shape == (batch.num_tokens, width)
    assert torch.allclose(student.log_probs().exp().sum(-1), torch.ones(batch.num_tokens))


def test_a_model_narrower_than_the_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    narrow = save_tiny(tmp_path / "narrow")
    tiny_model(300).save_pretrained(narrow)
    with pytest.raises(ModelError, match=r"The tokenizer has \d+ tokens and the models share 300 logits"):
        fit(folder, tmp_path, built(folder, Student(str(narrow))))


def test_a_resumed_epoch_is_not_evaluated_before_training_again(folder: Path, tmp_path: Path) -> None:
    fit(folder, tmp_path, built(folder), num_sanity_val_steps=-1)
    module = built(folder)
    options = QUIET | {"max_epochs": 2, "default_root_dir": tmp_path, "logger": False, "num_sanity_val_steps": -1}
    lightning.Trainer(**options, callbacks=[RunCheckpoint()]).fit(module, datamodule=data(folder), ckpt_path="last")
    assert [row["step"] for row in module.history] == [0, 2, 4]
