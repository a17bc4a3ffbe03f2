"""What Lightning refuses, and that another rank has failed, is one line."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distillkit.cli.main import main
from distillkit.workflows.refusals import refused_by_class
from helpers.runs import QUIET, save_models, write_config, write_prompts

BASE = Path(__file__).parents[2] / "configs" / "base.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("refusals")
    save_models(root)
    write_prompts(root / "train.jsonl", 4, response=True)
    return root


def arguments(folder: Path, root: Path, *more: str, **trainer: Any) -> list[str]:
    config = {
        "trainer": QUIET | {"default_root_dir": str(root / "run"), "max_epochs": 1} | trainer,
        "model": {"student": {"source": str(folder / "student")}, "loss": {"class_path": "CrossEntropy"}},
        "data": {"train": str(folder / "train.jsonl"), "batch_size": 2},
    }
    return ["fit", *more, "--config", write_config(root / "run.yaml", config)]


REFUSED = {
    "a strategy's name": ({"strategy": "dpp"}, r"invalid strategy name"),
    "a strategy that shards": ({"strategy": "fsdp"}, r"trainer"),
    "a package that is missing": ({"strategy": "deepspeed"}, "trainer"),
    "an accelerator": ({"accelerator": "abacus"}, r"abacus"),
    "an interval longer than an epoch": ({"val_check_interval": 100}, "val_check_interval"),
    "a metric that is not there": (
        {"callbacks": [{"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss"}}]},
        r"val/loss",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_can_not_work_is_one_line(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, words = REFUSED[name]
    validated = [f"--data.val={folder / 'train.jsonl'}"] if "interval" in name else []
    assert main([*arguments(folder, tmp_path, **trainer), *validated]) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = [text for text in error.splitlines() if text.startswith("distillkit fit: error: ")]
    assert words in line


def test_callbacks_of_the_base_are_switched_off_by_settings_of_the_trainer(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    more = ["--config", str(BASE), "--trainer.enable_checkpointing=false"]
    assert main(arguments(folder, tmp_path, *more)) == 0
    assert (root / "export" / "model.safetensors").exists()
    assert not (root / "checkpoints").exists()


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_a_bare_run_has_neither_loggers_nor_the_callbacks_that_it_refuses(folder: Path, tmp_path: Path) -> None:
    more = ["--config", str(BASE), "--trainer.barebones=true", "--trainer.log_every_n_steps=null"]
    without = {name: None for name in QUIET if name != "accelerator"}
    assert main(arguments(folder, tmp_path, *more, **without)) == 0
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()
    assert not {"csv", "tensorboard", "checkpoints"} & {path.name for path in (tmp_path / "run").iterdir()}


def test_variables_of_slurm_that_do_not_fit_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"NTASKS": "4", "JOB_NAME": "train", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert main(arguments(folder, tmp_path)) == 1
    assert (
        "error: trainer: Lightning can't make it with these settings: You set `--ntasks=4`" in capsys.readouterr().err
    )


def test_a_fault_of_a_class_keeps_its_traceback() -> None:
    assert refused_by_class(TypeError("wrong")) is None
    assert refused_by_class(AttributeError("wrong")) is None


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_the_error_of_the_rank_that_failed_is_not_hidden_by_the_other(rank: int, folder: Path, tmp_path: Path) -> None:
    failing = {"class_path": "helpers.killed.FailingRank", "init_args": {"rank": rank}}
    trainer = {"strategy": "ddp", "devices": 2, "callbacks": [failing], "log_every_n_steps": 1}
    command = [sys.executable, "-m", "distillkit", *arguments(folder, tmp_path, **trainer), "--data.batch_size=1"]
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 1
    errors = [line for line in ended.stderr.splitlines() if line.startswith("distillkit fit: error: ")]
    assert "distillkit fit: error: This rank has failed: mend it." in errors
    assert any(f"Rank {1 - rank} stopped because another rank did" in line for line in errors)
    assert "closed by peer" not in ended.stderr
    assert "Traceback" not in ended.stderr
