"""Settings of the trainer that can't work are refused in one line, before a model is loaded."""

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
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from distillkit import DistillData, DistillModule, Student
from distillkit.errors import ConfigError
from distillkit.losses import CrossEntropy
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
