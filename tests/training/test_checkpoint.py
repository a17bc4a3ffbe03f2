"""Modules and students made again from a checkpoint alone."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from distillkit import DistillData, DistillModule, Lora, Sampling, Student
from distillkit.callbacks import Export, RunCheckpoint
from distillkit.curators.paired import PairedCurator
from distillkit.curators.single import StudentCurator, TeacherCurator
from distillkit.errors import ConfigError, ModelError
from distillkit.generators.transformers import TransformersGenerator
from distillkit.losses import DistiLLM2, ForwardKL
from distillkit.schedules import AdaptiveAlpha
from distillkit.teachers.transformers import TransformersTeacher
from distillkit.types import Batch
from distillkit.workflows import export
from helpers.models import save_tiny
from helpers.runs import QUIET, save_models, write_prompts

SHORT = Sampling(max_new_tokens=4)
LORA = Lora(r=2)


class Rescaled(ForwardKL):
    """A loss with a setting that is no plain value."""

    def __init__(self, scale_of: Callable[[int], float]) -> None:
        super().__init__()
        self.scale_of = scale_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoint")
    save_models(root)
    write_prompts(root / "train.jsonl", 4, response=True)
    write_prompts(root / "val.jsonl", 3, response=True)
    return root


def built(folder: Path, lora: Lora | None = None, **settings: Any) -> DistillModule:
    """A module on the tiny models."""
    settings.setdefault("optimizer", functools.partial(torch.optim.AdamW, lr=1e-2))
    return DistillModule(
        Student(str(folder / "student"), lora=lora),
        settings.pop("loss", None) or DistiLLM2(AdaptiveAlpha(warmup_steps=1)),
        TransformersTeacher(str(folder / "teacher"), dtype="float32"),
        PairedCurator(TeacherCurator(SHORT), StudentCurator(SHORT)),
        TransformersGenerator(progress=False),
        answers=Sampling(temperature=0.0, max_new_tokens=4),
        **settings,
    )


def trainer(root: Path, **settings: Any) -> lightning.Trainer:
    options = QUIET | {"max_epochs": 1, "default_root_dir": root, "logger": False, "num_sanity_val_steps": 0} | settings
    return lightning.Trainer(**options)


@functools.cache
def fitted(folder: Path, root: Path, lora: Lora | None) -> DistillModule:
    """The module of a run of two steps, whose checkpoint and export are in `root`."""
    module = built(folder, lora)
    run = trainer(root, callbacks=[RunCheckpoint(), Export()])
    run.fit(module, DistillData(str(folder / "train.jsonl"), str(folder / "val.jsonl"), batch_size=2))
    return module


@pytest.fixture(scope="module", params=[None, LORA], ids=["full", "lora"])
def run(folder: Path, request: pytest.FixtureRequest) -> tuple[Path, DistillModule]:
    """The checkpoint of a run from Python, and the module that wrote it."""
    root = folder / ("full" if request.param is None else "lora")
    return root / "checkpoints" / "last.ckpt", fitted(folder, root, request.param)


def batch_of(module: DistillModule) -> Batch:
    return next(iter(module.trainer.datamodule.val_dataloader()))


def test_a_module_is_made_again_from_its_checkpoint_alone(run: tuple[Path, DistillModule]) -> None:
    path, module = run
    again = DistillModule.load_from_checkpoint(path)
    assert again.hparams == module.hparams
    ours, theirs = again.state_dict(), module.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if isinstance(theirs[name], torch.Tensor))
    assert float(theirs["loss.alpha_teacher.gap_sum"]) != 0, "or the state of the parts is not tested"
    assert again.history == module.history


def test_it_scores_as_the_module_that_was_trained(run: tuple[Path, DistillModule]) -> None:
    path, module = run
    again, batch = DistillModule.load_from_checkpoint(path), batch_of(module)
    assert again.teacher.model is None, "the teacher is loaded when it is needed"
    for ours, theirs in zip(again.eval().score(batch), module.eval().score(batch), strict=True):
        assert torch.equal(ours.log_probs(), theirs.log_probs())


def test_it_validates_as_the_run_did(run: tuple[Path, DistillModule], tmp_path: Path) -> None:
    path, module = run
    again, data = DistillModule.load_from_checkpoint(path), DistillData.load_from_checkpoint(path)
    assert data.hparams == module.trainer.datamodule.hparams
    (metrics,) = trainer(tmp_path).validate(again, data, verbose=False)
    last = module.history[-1]
    assert metrics == pytest.approx(last, rel=1e-5)
    assert last["step"] == 2


def test_it_can_be_trained_further(run: tuple[Path, DistillModule], tmp_path: Path) -> None:
    path, module = run
    again = DistillModule.load_from_checkpoint(path, warmup=0.5)
    assert (again.warmup, again.optimizer.keywords["lr"]) == (0.5, 1e-2)
    trainer(tmp_path).fit(again, DistillData.load_from_checkpoint(path))
    assert again.trainer.global_step == 2
    assert [row["step"] for row in again.history] == [2], "another run has a history of its own"
    assert again.history[-1]["val/kl"] < module.history[-1]["val/kl"]


def test_its_student_is_exported_without_the_rest_of_the_run(run: tuple[Path, DistillModule], tmp_path: Path) -> None:
    path, module = run
    teacher = Path(module.teacher.source)
    teacher.rename(tmp_path / "hidden")
    try:
        target = export(path, tmp_path / "out")
        with pytest.raises(ModelError, match=rf"the run's teacher can't be made again. {teacher} does not exist"):
            DistillModule.load_from_checkpoint(path)
    finally:
        (tmp_path / "hidden").rename(teacher)
    ours, theirs = (load_file(root / "model.safetensors") for root in (target, path.parent.parent / "export"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    assert model.generate(**tokenizer("a", return_tensors="pt"), max_new_tokens=2).shape[0] == 1
    with pytest.raises(ConfigError, match=f"{target} is not empty. Name a new folder"):
        export(path, target)


def test_a_student_that_moved_is_named(folder: Path, tmp_path: Path) -> None:
    home = Path(shutil.copytree(folder / "student", tmp_path / "old"))
    module = built(folder)
    module = DistillModule(Student(str(home), lora=LORA), ForwardKL(), module.teacher, module.curator, module.generator)
    trainer(tmp_path, callbacks=[RunCheckpoint()]).fit(module, DistillData(str(folder / "train.jsonl"), batch_size=4))
    home.rename(tmp_path / "new")
    path, moved = tmp_path / "checkpoints" / "last.ckpt", Student(str(tmp_path / "new"), lora=LORA)
    message = rf"the run's student can't be loaded. {home} does not exist\..* pass student=Student\(...\)"
    with pytest.raises(ModelError, match=message):
        DistillModule.load_from_checkpoint(path)
    with pytest.raises(ModelError, match=message):
        export(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    again = DistillModule.load_from_checkpoint(path, student=moved)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), module.parameters(), strict=True))
    assert export(path, tmp_path / "out", moved) == tmp_path / "out"


def test_another_model_in_the_student_s_place_is_refused(folder: Path, tmp_path: Path) -> None:
    path = folder / "full" / "checkpoints" / "last.ckpt"
    fitted(folder, folder / "full", None)
    for layers, message in (
        (1, "which the student lacks: it is from another student"),
        (3, "lacks 9 of the 30 trained weights"),
    ):
        other = Student(str(save_tiny(tmp_path / f"{layers}", layers=layers, seed=1)))
        with pytest.raises(ModelError, match=message):
            DistillModule.load_from_checkpoint(path, student=other)
    with pytest.raises(ModelError, match=r"does not fit DistillModule: .* such as loss.alpha_teacher"):
        DistillModule.load_from_checkpoint(path, loss=ForwardKL())
    assert isinstance(DistillModule.load_from_checkpoint(path, loss=ForwardKL(), strict=False).loss, ForwardKL)


def test_what_was_not_recorded_is_asked_for(folder: Path, tmp_path: Path) -> None:
    module = built(
        folder, loss=Rescaled(lambda step: 1.0), optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1)
    )
    data = DistillData(str(folder / "train.jsonl"), batch_size=4)
    trainer(tmp_path, callbacks=[RunCheckpoint()]).fit(module, data)
    path = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(ModelError, match=r"loss can't be made again. It was not recorded, .* Pass .*loss=\.\.\."):
        DistillModule.load_from_checkpoint(path)
    again = DistillModule.load_from_checkpoint(path, loss=Rescaled(lambda step: 1.0))
    assert module.hparams["optimizer"] == "(not recorded) builtins.function"
    with pytest.raises(ConfigError, match=r"the run's optimizer can't be made again.*optimizer=\.\.\."):
        trainer(tmp_path / "more").fit(again, data)


def damaged(path: Path, size: int) -> Path:
    path.write_bytes(path.read_bytes()[:size])
    return path


class Boring(lightning.LightningModule):
    """Any other module."""


@pytest.mark.parametrize(
    ("prepare", "kind", "message"),
    [
        (lambda path: path.parent / "none.ckpt", ConfigError, "There is no checkpoint .*none.ckpt. Check the path"),
        (lambda path: path.parent.parent, ConfigError, r"is a folder. Name a checkpoint in it, such as .*last\.ckpt"),
        (lambda path: damaged(path, 1000), ModelError, "is damaged .it is cut, or no checkpoint.: name another"),
        (lambda path: damaged(path, 0), ModelError, "is damaged .it is cut, or no checkpoint.: name another"),
        (lambda path: (torch.save({"state_dict": {}}, path), path)[1], ModelError, "was not written by a run"),
        (lambda path: (torch.save([1], path), path)[1], ModelError, "was not written by a run of distillkit"),
        (lambda path: (torch.save(Boring(), path), path)[1], ModelError, "or contains more than tensors and plain"),
    ],
)
def test_what_is_no_checkpoint_of_ours_is_refused(
    prepare: Callable[[Path], Path], kind: type[Exception], message: str, folder: Path, tmp_path: Path
) -> None:
    fitted(folder, folder / "full", None)
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    path = prepare(Path(shutil.copy(folder / "full" / "checkpoints" / "last.ckpt", checkpoints)))
    for cls in (DistillModule, DistillData):
        with pytest.raises(kind, match=message):
            cls.load_from_checkpoint(path)


def test_settings_in_a_file_are_refused(folder: Path) -> None:
    for cls in (DistillModule, DistillData):
        with pytest.raises(ConfigError, match="hparams_file is not supported: pass the settings by name"):
            cls.load_from_checkpoint(folder / "x.ckpt", hparams_file="hparams.yaml")
