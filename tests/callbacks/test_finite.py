"""No step is taken with a loss or a gradient that is no number, and no such student is exported."""

import math
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from distillkit import DistillData, DistillModule, Student
from distillkit.callbacks import Export, FiniteLoss
from distillkit.errors import ModelError, TrainingError
from distillkit.losses import CrossEntropy
from distillkit.types import LossOutput
from helpers.runs import QUIET, MemoryLogger, save_models, write_prompts


class BrokenLoss(CrossEntropy):
    """A value that is broken in the third micro-batch."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value, self.calls = value, 0

    def forward(self, *args: Any) -> LossOutput:
        output = super().forward(*args)
        self.calls += 1
        return self.changed(output) if self.calls == 3 else output

    def changed(self, output: LossOutput) -> LossOutput:
        return LossOutput(output.total * self.value, output.units, output.metrics)


class BrokenGradient(BrokenLoss):
    """A finite value whose gradient is broken."""

    def changed(self, output: LossOutput) -> LossOutput:
        output.total.register_hook(lambda grad: grad * self.value)
        return output


class Weights(lightning.Callback):
    """Keeps the weights as they were before each step."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.last = {name: value.clone() for name, value in pl_module.student.state_dict().items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finite")
    save_models(root)
    write_prompts(root / "train.jsonl", 8, response=True)
    return root


def fit(folder: Path, root: Path, loss: CrossEntropy, *callbacks: Any, **settings: Any) -> DistillModule:
    module = DistillModule(
        Student(str(folder / "student")), loss, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1)
    )
    options = QUIET | {"max_epochs": 1, "default_root_dir": root, "enable_checkpointing": False, "logger": False}
    trainer = lightning.Trainer(**options | settings, callbacks=list(callbacks))
    trainer.fit(module, DistillData(str(folder / "train.jsonl"), batch_size=2))
    return module


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("loss", "name"), [(BrokenLoss, "loss"), (BrokenGradient, "gradient")])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_run_ends_before_the_weights_change(
    loss: type[BrokenLoss], name: str, value: float, accumulate: int, folder: Path, tmp_path: Path
) -> None:
    weights, export, broken = Weights(), Export(), loss(value)
    step = 3 if accumulate == 1 else 2
    with pytest.raises(TrainingError, match=rf"The {name} was (nan|inf) in step {step} on rank 0: lower"):
        fit(
            folder,
            tmp_path,
            broken,
            FiniteLoss(),
            weights,
            export,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=1.0,
        )
    assert all(bool(value.isfinite().all()) for value in weights.last.values())
    assert not (tmp_path / "export").exists()


def test_a_run_of_numbers_goes_on(folder: Path, tmp_path: Path) -> None:
    module = fit(folder, tmp_path, BrokenLoss(1.0), FiniteLoss(), Export())
    assert module.loss.calls == 4
    assert (tmp_path / "export" / "model.safetensors").exists()


class Breaking(lightning.Callback):
    """Breaks the student after the last step."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        for parameter in pl_module.student.parameters():
            parameter.data.fill_(math.nan)


def test_a_student_of_nans_is_not_exported(folder: Path, tmp_path: Path) -> None:
    earlier = tmp_path / "export" / "model.safetensors"
    earlier.parent.mkdir()
    earlier.write_text("earlier")
    with pytest.raises(ModelError, match=r"\d+ tensors of the student hold NaN or infinity, such as model\."):
        fit(folder, tmp_path, BrokenLoss(1.0), Breaking(), Export())
    assert earlier.read_text() == "earlier"


def test_in_float16_an_overflow_is_skipped_and_counted(folder: Path, tmp_path: Path) -> None:
    logger = MemoryLogger()
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0))
    module = fit(folder, tmp_path, BrokenGradient(math.inf), FiniteLoss(), plugins=precision, logger=logger)
    assert logger.column("train/skipped_steps") == [0, 0, 1, 1]
    assert all(bool(value.isfinite().all()) for value in module.student.state_dict().values())


@pytest.mark.parametrize("saves", [True, False])
def test_a_run_checks_by_itself(saves: bool, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"The loss was nan in step 3"):
        fit(folder, tmp_path, BrokenLoss(math.nan), enable_checkpointing=saves)
