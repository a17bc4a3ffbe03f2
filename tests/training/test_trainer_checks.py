"""Settings of the trainer that can't work are refused in one line, before a model is loaded."""

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy

from distillkit import DistillData, DistillModule, Student
from distillkit.errors import ConfigError, DataError
from distillkit.losses import CrossEntropy, DistiLLM2, ForwardKL
from distillkit.teachers import TransformersTeacher
from helpers.runs import QUIET, MemoryLogger, save_models, write_prompts

REFUSED = {
    "swa": (lambda: StochasticWeightAveraging(1e-3), r"StochasticWeightAveraging .* averages nothing"),
    "average": (WeightAveraging, r"WeightAveraging .* averages the schedules"),
    "ema": (EMAWeightAveraging, r"EMAWeightAveraging .* averages the schedules"),
    "pruning": (lambda: ModelPruning("l1_unstructured"), r"ModelPruning .*keep_layers"),
    "accumulation": (lambda: GradientAccumulationScheduler({0: 4}), r"GradientAccumulationScheduler .* steps of one"),
    "lr": (LearningRateFinder, r"LearningRateFinder .* Set the learning rate in model\.optimizer"),
    "batch size": (BatchSizeFinder, r"BatchSizeFinder .* Set data\.batch_size"),
    "layers": (BackboneFinetuning, r"BackboneFinetuning .* model\.student\.lora"),
}


class Untouched(Student):
    """A student that must not be loaded."""

    def load(self) -> Any:
        raise AssertionError("loaded")


def module(source: Any = "nowhere", student: type[Student] = Untouched, **settings: Any) -> DistillModule:
    return DistillModule(student(str(source)), CrossEntropy(), **settings)


@pytest.mark.parametrize("name", REFUSED)
def test_a_callback_that_can_not_work_is_refused(name: str, tmp_path: Path) -> None:
    make, words = REFUSED[name]
    trainer = lightning.Trainer(**QUIET, callbacks=[make()], default_root_dir=tmp_path, max_epochs=1)
    with pytest.raises(ConfigError, match=r"trainer\.callbacks: " + words):
        trainer.fit(module(), DistillData("nothing.jsonl"))


@pytest.mark.parametrize("strategy", [ModelParallelStrategy, FSDPStrategy])
def test_a_strategy_that_shards_is_refused(strategy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = lightning.Trainer(**QUIET, default_root_dir=tmp_path, logger=False)
    monkeypatch.setattr(type(trainer), "strategy", strategy())  # Lightning has some of them on GPUs alone
    model = module()
    model.trainer = trainer
    with pytest.raises(ConfigError, match=rf"trainer\.strategy: {strategy.__name__} is not supported.*Use `ddp`"):
        model.configure_callbacks()


NUMBERS = {
    "accumulate_grad_batches": (0, -1),
    "check_val_every_n_epoch": (0, -2),
    "val_check_interval": (0, 0.0),
    "gradient_clip_val": (-1.0,),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in NUMBERS.items() for value in values])
def test_a_number_that_lightning_takes_and_can_not_use_is_refused(name: str, value: float, tmp_path: Path) -> None:
    trainer = lightning.Trainer(**QUIET, **{name: value}, default_root_dir=tmp_path, max_epochs=1)
    with pytest.raises(ConfigError, match=rf"trainer\.{name} must be .* 0, got {value}"):
        trainer.fit(module(), DistillData("nothing.jsonl"))


def test_a_static_graph_and_accumulation_are_refused_together(tmp_path: Path) -> None:
    strategy = DDPStrategy(static_graph=True)
    trainer = lightning.Trainer(
        **QUIET, strategy=strategy, devices=2, accumulate_grad_batches=2, default_root_dir=tmp_path
    )
    model = module()
    model.trainer = trainer
    with pytest.raises(ConfigError, match=r"static_graph can't be used with trainer\.accumulate_grad_batches above 1"):
        model.configure_callbacks()


def checked(tmp_path: Path, callback: Any, val: str | None = "val.jsonl", **settings: Any) -> None:
    """Runs the checks; the files of the data are not there, which is found next."""
    trainer = lightning.Trainer(**QUIET, callbacks=[callback], default_root_dir=tmp_path, max_epochs=1)
    with pytest.raises(DataError, match="nothing"):
        trainer.fit(module(**settings), DistillData("./nothing.jsonl", val))


@pytest.mark.parametrize("kind", [EarlyStopping, lambda monitor: ModelCheckpoint(monitor=monitor)])
def test_a_metric_that_there_will_not_be_is_refused_before_training(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"monitors val/nll, and there are no held-out prompts: set data\.val"):
        checked(tmp_path, kind("val/nll"), val=None)
    with pytest.raises(ConfigError, match=r"monitors val/kl, which needs a teacher .* logs val/nll, val/rouge_l"):
        checked(tmp_path, kind("val/kl"))


@pytest.mark.parametrize(
    ("monitor", "mode", "words"),
    [
        ("val/other", "min", r"monitors val/other\. A run logs val/nll, val/rouge_l; another metric must be logged by"),
        ("val/rouge_l", "min", r"takes the min of val/rouge_l for the best, and a larger one is better"),
        ("val/nll", "max", r"takes the max of val/nll for the best, and a smaller one is better"),
        ("val/nll", "min", r"^$"),
        ("val/rouge_l", "max", r"^$"),
        ("train/loss", "min", r"^$"),
    ],
)
def test_a_metric_of_others_and_a_wrong_direction_are_said(
    monitor: str, mode: str, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", "distillkit"):
        checked(tmp_path, EarlyStopping(monitor, mode=mode))
    assert re.search(
        words, "".join(record.getMessage() for record in caplog.records if record.name.startswith("distil"))
    )


def test_callbacks_that_watch_work_together(tmp_path: Path) -> None:
    save_models(tmp_path)
    train = write_prompts(tmp_path / "train.jsonl", 4, response=True)
    watching = [
        EarlyStopping("val/nll", patience=5),
        LearningRateMonitor("step"),
        Timer(timedelta(minutes=5)),
        ModelCheckpoint(tmp_path / "best", "best", monitor="val/nll"),
    ]
    trainer = lightning.Trainer(
        **QUIET, callbacks=watching, default_root_dir=tmp_path, logger=MemoryLogger(), max_epochs=2
    )
    model = module(tmp_path / "student", Student, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    trainer.fit(model, DistillData(train, train, batch_size=2))
    assert (tmp_path / "best" / "best.ckpt").exists()
    assert float(watching[3].best_model_score) == pytest.approx(min(row["val/nll"] for row in model.history[1:]))
    assert len(trainer.logger.column("lr-SGD")) == 4


@pytest.mark.parametrize("monitor", ["val/loss", "val/gold_nll"])
def test_a_metric_of_the_datas_answers_needs_them(monitor: str, tmp_path: Path) -> None:
    teacher, student = save_models(tmp_path)
    train = write_prompts(tmp_path / "train.jsonl", 2, response=True)
    held_out = write_prompts(tmp_path / "val.jsonl", 2)
    trainer = lightning.Trainer(**QUIET, callbacks=[EarlyStopping(monitor)], default_root_dir=tmp_path, max_epochs=1)
    model = DistillModule(Student(student), ForwardKL(), TransformersTeacher(teacher, dtype="float32"))
    with pytest.raises(ConfigError, match=rf"EarlyStopping monitors {monitor}, which needs responses in data\.val"):
        trainer.fit(model, DistillData(train, held_out))
    model.loss = DistiLLM2()
    with pytest.raises(ConfigError, match=rf"monitors {monitor}, which needs (a loss that|responses in data)"):
        trainer.fit(model, DistillData(train, held_out))
