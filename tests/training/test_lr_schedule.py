"""Learning-rate schedules: the built-in shapes, and schedulers of the user's own."""

import functools
import math
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import yaml
from lightning import Callback
from lightning.pytorch.cli import ReduceLROnPlateau
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    SequentialLR,
    StepLR,
)

from distillkit import DistillData, DistillModule, Student
from distillkit.callbacks import RunCheckpoint
from distillkit.cli.main import main
from distillkit.curators.single import DatasetCurator
from distillkit.errors import ConfigError
from distillkit.losses import CrossEntropy
from distillkit.training.lr_schedule import check_schedule
from helpers.runs import QUIET, save_models, write_config, write_prompts

ADAM = functools.partial(torch.optim.AdamW, lr=1.0)


class Rates(Callback):
    """Keeps the learning rate of each optimizer step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        self.values.append(optimizer.param_groups[0]["lr"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rates")
    save_models(root)
    write_prompts(root / "train.jsonl", 4, response=True)
    return root


def fit(folder: Path, root: Path, ckpt_path: str | None = None, epochs: int = 2, **settings: Any) -> list[float]:
    """The learning rates of a run with two optimizer steps, of two micro-batches each, per epoch."""
    settings = {"optimizer": ADAM} | settings
    module = DistillModule(Student(str(folder / "student")), CrossEntropy(), curator=DatasetCurator(), **settings)
    rates = Rates()
    options = QUIET | {"default_root_dir": root, "logger": False, "accumulate_grad_batches": 2, "max_epochs": epochs}
    trainer = lightning.Trainer(**options, callbacks=[rates, RunCheckpoint()])
    trainer.fit(module, DistillData(str(folder / "train.jsonl"), batch_size=1), ckpt_path=ckpt_path)
    return rates.values


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (functools.partial(StepLR, step_size=1, gamma=0.5), [1, 0.5, 0.25, 0.125]),
        (lambda optimizer: CosineAnnealingLR(optimizer, T_max=4), [1.0, 0.8536, 0.5, 0.1464]),
    ],
)
def test_a_scheduler_takes_a_step_with_each_of_the_optimizer(
    schedule: Any, expected: list[float], folder: Path, tmp_path: Path
) -> None:
    assert fit(folder, tmp_path, lr_schedule=schedule) == pytest.approx(expected, abs=1e-4)


def test_a_resumed_scheduler_goes_on(folder: Path, tmp_path: Path) -> None:
    schedule = functools.partial(StepLR, step_size=1, gamma=0.5)
    assert fit(folder, tmp_path, epochs=1, lr_schedule=schedule) == [1, 0.5]
    assert fit(folder, tmp_path, ckpt_path="last", lr_schedule=schedule) == [0.25, 0.125]


def test_a_scheduler_that_needs_momentum_is_tried_with_the_run_s_optimizer(folder: Path, tmp_path: Path) -> None:
    schedule = functools.partial(OneCycleLR, max_lr=1.0, total_steps=4)
    assert len(set(fit(folder, tmp_path, lr_schedule=schedule))) == 4


def test_shapes_have_a_warm_up_of_five_percent_by_default() -> None:
    def warmup(**settings: Any) -> float:
        return DistillModule(Student("x"), CrossEntropy(), curator=DatasetCurator(), **settings).warmup

    assert warmup() == 0.05
    assert warmup(warmup=0.0, lr_schedule="linear") == 0.0
    assert warmup(lr_schedule=StepLR) == 0.0
    assert warmup(lr_schedule=StepLR, warmup=0.0) == 0.0
    with pytest.raises(ConfigError, match=r"model.warmup must be null where model.lr_schedule is a scheduler, got 0.1"):
        warmup(lr_schedule=StepLR, warmup=0.1)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (torch.optim.lr_scheduler.ReduceLROnPlateau, "can't be ReduceLROnPlateau: it waits for a metric"),
        (functools.partial(ReduceLROnPlateau, monitor="val/kl"), "can't be ReduceLROnPlateau: it waits for a metric"),
        (lambda optimizer: None, "model.lr_schedule must return a scheduler of torch, got NoneType"),
        (functools.partial(LinearLR, start_factor=0), "can't be made: Starting multiplicative factor expected"),
        (functools.partial(LambdaLR, lr_lambda=math.exp), "LambdaLR can't be saved in a checkpoint"),
    ],
)
def test_what_is_no_schedule_by_steps_is_refused_before_a_model_is_loaded(
    schedule: Any, message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DistillModule, "configure_model", lambda self: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match=message):
        fit(folder, tmp_path, lr_schedule=schedule)


@pytest.mark.parametrize(
    "schedule",
    [
        functools.partial(OneCycleLR, max_lr=1.0, total_steps=3),
        lambda optimizer: SequentialLR(
            optimizer, [ConstantLR(optimizer), OneCycleLR(optimizer, max_lr=1.0, total_steps=2)], [1]
        ),
    ],
    ids=["alone", "in a sequence"],
)
def test_a_cycle_that_ends_before_the_run_is_refused(schedule: Any, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"OneCycleLR has [23] steps .*, and the run takes [34] optimizer steps"):
        fit(folder, tmp_path, lr_schedule=schedule)


def test_an_optimizer_that_selects_parameters_has_a_scheduler(folder: Path, tmp_path: Path) -> None:
    def by_index(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW([{"params": [parameters[3]]}, {"params": parameters[4:]}], lr=1.0)

    schedule = functools.partial(StepLR, step_size=1, gamma=0.5)
    assert fit(folder, tmp_path, optimizer=by_index, lr_schedule=schedule) == [1, 0.5, 0.25, 0.125]


def config(folder: Path, root: Path, schedule: Any) -> str:
    return write_config(
        root / "config.yaml",
        {
            "trainer": QUIET | {"default_root_dir": str(root / "run"), "max_steps": 3, "logger": False},
            "model": {
                "student": {"source": str(folder / "student")},
                "loss": {"class_path": "CrossEntropy"},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0}},
                "lr_schedule": schedule,
            },
            "data": {"train": str(folder / "train.jsonl"), "batch_size": 2},
        },
    )


def test_a_configuration_names_a_scheduler(folder: Path, tmp_path: Path) -> None:
    schedule = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1, "gamma": 0.5}}
    checkpoints = "--trainer.callbacks+=RunCheckpoint"
    assert main(["fit", "--config", config(folder, tmp_path, schedule), checkpoints]) == 0
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert resolved["model"]["lr_schedule"]["init_args"]["step_size"] == 1
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert saved["lr_schedulers"][0]["_last_lr"] == [0.125]
    assert saved["hyper_parameters"]["lr_schedule"]["class_path"] == "torch.optim.lr_scheduler.StepLR"


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("cosin", "model.lr_schedule must be constant or linear or cosine or the name of a part, got cosin."),
        (
            {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step": 1}},
            "unknown key model.lr_schedule.step. Did you mean step_size?",
        ),
        ({"class_path": "torch.optim.lr_scheduler.StepLR"}, "step_size must be set"),
        ({"class_path": "torch.optim.SGD"}, "Expected 'torch.optim.SGD' to be a subclass of Union[LRScheduler"),
        ({"class_path": "torch.optim.Nope"}, "module 'torch.optim' has no attribute 'Nope'"),
    ],
)
def test_a_wrong_schedule_is_refused_in_one_line(
    schedule: Any, message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", config(folder, tmp_path, schedule)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert "typing" not in error


@pytest.mark.parametrize(
    ("optimizer", "schedule", "message"),
    [
        (functools.partial(torch.optim.AdamW, lr=-1.0), "cosine", r"model.optimizer .* Invalid learning rate: -1.0"),
        (functools.partial(torch.optim.AdamW, betas=(0.9, 1.5)), "cosine", r"model.optimizer .* Invalid beta"),
        (functools.partial(torch.optim.SGD, lr=0.1, nesterov=True), "cosine", r"model.optimizer .* Nesterov momentum"),
        (ADAM, functools.partial(StepLR, step_size=0), r"model.lr_schedule .*ZeroDivisionError"),
        (ADAM, functools.partial(CosineAnnealingLR, T_max=0), r"model.lr_schedule .*ZeroDivisionError"),
        (ADAM, functools.partial(OneCycleLR, max_lr=1.0, total_steps=0), r"model.lr_schedule .*positive"),
    ],
)
def test_settings_that_torch_refuses_are_one_line_before_a_model_is_loaded(optimizer, schedule, message):
    with pytest.raises(ConfigError, match=message):
        check_schedule(optimizer, schedule)


def test_a_cycle_of_as_many_steps_as_the_run_comes_to_its_end(folder, tmp_path):
    rates = fit(folder, tmp_path / "exact", lr_schedule=functools.partial(OneCycleLR, max_lr=1.0, total_steps=4))
    assert len(rates) == 4
