"""Callbacks that a run has by itself: from Python, and by a configuration that names none."""

import logging
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger

from distillkit import DistillData, DistillModule, Student
from distillkit.callbacks import Export, FiniteLoss, RunCheckpoint
from distillkit.callbacks.progress import RichBar, TextBar
from distillkit.cli.main import main
from distillkit.config import load
from distillkit.losses import CrossEntropy
from distillkit.training.lr_schedule import ADAMW
from helpers.docs import ROOT
from helpers.runs import QUIET, save_models, write_config, write_prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("defaults")
    save_models(root)
    write_prompts(root / "train.jsonl", 4, response=True)
    return root


def fit(folder: Path, root: Path, callbacks: Any = (), export: bool = True, **settings: Any) -> lightning.Trainer:
    """A run of one step by a plain trainer."""
    module = DistillModule(Student(str(folder / "student")), CrossEntropy(), export=export)
    options = QUIET | {"max_steps": 1, "default_root_dir": root, "logger": False} | settings
    trainer = lightning.Trainer(**options, callbacks=list(callbacks))
    trainer.fit(module, DistillData(str(folder / "train.jsonl"), batch_size=2))
    return trainer


def kinds(trainer: lightning.Trainer) -> list[type]:
    ours = (Export, FiniteLoss, ModelCheckpoint)
    return [type(callback) for callback in trainer.callbacks if isinstance(callback, ours)]


def test_a_plain_trainer_checks_saves_and_exports(folder: Path, tmp_path: Path) -> None:
    trainer = fit(folder, tmp_path, logger=CSVLogger(tmp_path, "csv"))
    assert kinds(trainer) == [FiniteLoss, Export, RunCheckpoint]
    assert (tmp_path / "export" / "model.safetensors").exists()
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()
    (group,) = trainer.optimizers[0].param_groups
    assert isinstance(trainer.optimizers[0], torch.optim.AdamW)
    assert (group["initial_lr"], group["weight_decay"]) == (2e-5, 0.0)


def test_a_second_run_of_a_trainer_adds_nothing(folder: Path, tmp_path: Path) -> None:
    trainer = fit(folder, tmp_path)
    trainer.fit(trainer.lightning_module, trainer.datamodule)
    assert kinds(trainer) == [FiniteLoss, Export, RunCheckpoint]


def test_callbacks_of_ones_own_stay_as_they_are(folder: Path, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1)
    export = Export(str(tmp_path / "elsewhere"))
    trainer = fit(folder, tmp_path, [checkpoint, export])
    assert kinds(trainer) == [Export, FiniteLoss, ModelCheckpoint]
    assert checkpoint in trainer.callbacks
    assert (tmp_path / "elsewhere").is_dir()
    assert not (tmp_path / "export").exists()


def test_a_run_without_an_export_says_so(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "distillkit"):
        trainer = fit(folder, tmp_path, export=False)
    assert kinds(trainer) == [FiniteLoss, RunCheckpoint]
    assert "No student folder was written: `distillkit export` writes one from" in caplog.text
    assert str(tmp_path / "checkpoints") in caplog.text


def test_a_run_that_saves_nothing_says_so(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "distillkit"):
        trainer = fit(folder, tmp_path, enable_checkpointing=False)
    assert kinds(trainer) == [FiniteLoss]
    assert "Neither a student folder nor a checkpoint was written" in caplog.text
    assert not (tmp_path / "export").exists()


def test_a_configuration_without_a_base_has_them_too(folder: Path, tmp_path: Path) -> None:
    settings = {
        "trainer": QUIET | {"default_root_dir": str(tmp_path / "run"), "max_epochs": 1},
        "model": {"student": {"source": str(folder / "student")}, "loss": "CrossEntropy"},
        "data": {"train": str(folder / "train.jsonl")},
    }
    assert main(["fit", "--config", write_config(tmp_path / "run.yaml", settings)]) == 0
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]
    assert resolved["optimizer"]["class_path"] == "torch.optim.AdamW"
    assert resolved["optimizer"]["init_args"].items() >= ADAMW.keywords.items()
    assert resolved["lr_schedule"] == "cosine"


def test_the_base_of_all_configurations_repeats_no_default() -> None:
    base = load(ROOT / "configs" / "base.yaml")
    assert base.keys() == {"trainer"}, "the model's settings are the defaults of DistillModule"
    names = {callback["class_path"] for callback in base["trainer"]["callbacks"]}
    assert names.isdisjoint({"FiniteLoss", "RunCheckpoint", "Export"})


@pytest.mark.parametrize(("bar", "kind"), [(RichProgressBar(leave=True), RichBar), (TQDMProgressBar(7), TextBar)])
def test_a_bar_of_lightning_shows_the_metrics_of_a_run(bar: Any, kind: type, folder: Path, tmp_path: Path) -> None:
    trainer = fit(folder, tmp_path, [bar], enable_progress_bar=True, enable_checkpointing=False)
    (replaced,) = [
        callback for callback in trainer.callbacks if isinstance(callback, lightning.pytorch.callbacks.ProgressBar)
    ]
    assert type(replaced) is kind
    assert replaced._leave == bar._leave
    assert replaced.refresh_rate == bar.refresh_rate
