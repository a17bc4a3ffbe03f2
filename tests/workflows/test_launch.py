"""The verbs on a run of tiny models."""

import csv
import json
import logging
from pathlib import Path

import pytest
import torch
import yaml

from distillkit.cli.main import main
from distillkit.workflows import launch
from helpers.locks import locked
from helpers.runs import QUIET, command, save_models, write_config, write_prompts

FIGURES = ("kl", "nll", "acceptance", "rouge_l")
ALLOWED = {".lock", ".lock-owner.json", "csv", "tensorboard", "run.log"}
"""What a run that is refused may leave in a folder."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of two steps, with its config file beside it."""
    root = tmp_path_factory.mktemp("verbs")
    teacher, student = save_models(root)
    config = {
        "trainer": QUIET
        | {
            "default_root_dir": str(root / "run"),
            "max_epochs": 1,
            "callbacks": [{"class_path": "RunCheckpoint"}, {"class_path": "Answers", "init_args": {"shown": 0}}],
        },
        "model": {
            "student": {"source": student},
            "teacher": {"class_path": "TransformersTeacher", "init_args": {"source": teacher, "dtype": "float32"}},
            "loss": {"class_path": "SkewKL"},
            "curator": {"class_path": "TeacherCurator", "init_args": {"sampling": {"max_new_tokens": 4}}},
            "answers": {"temperature": 0.0, "max_new_tokens": 4},
        },
        "data": {
            "train": write_prompts(root / "train.jsonl", 4),
            "val": write_prompts(root / "val.jsonl", 3),
            "test": write_prompts(root / "test.jsonl", 2),
            "batch_size": 2,
        },
    }
    write_config(root / "config.yaml", config)
    assert command(["fit", "--config", str(root / "config.yaml")]) == 0
    return root / "run"


def logged(run: Path, version: int) -> list[dict[str, str]]:
    with (run / "csv" / f"version_{version}" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def measure(run: Path, verb: str) -> tuple[int, dict[str, str]]:
    """What a verb logs of the newest checkpoint."""
    before = len(list(run.glob("csv/version_*")))
    assert command([verb, "--config", str(run.parent / "config.yaml"), "--ckpt_path", "last"]) == 0
    (row,) = logged(run, before)
    return int(row["step"]), row


def test_validate_measures_the_checkpoint_as_training_did(run: Path) -> None:
    last = [row for row in logged(run, 0) if row["val/kl"]][-1]
    answers = (run / "answers.jsonl").read_text()
    step, found = measure(run, "validate")
    assert sorted((run / "answers.jsonl").read_text().splitlines()) == sorted(answers.splitlines()), (
        "each is there once"
    )
    assert step == 2, "not 0, which is before training"
    for name in FIGURES:
        assert float(found[f"val/{name}"]) == pytest.approx(float(last[f"val/{name}"]), rel=1e-6)


def test_test_measures_it_on_the_test_prompts(run: Path) -> None:
    before = len((run / "answers.jsonl").read_text().splitlines())
    step, found = measure(run, "test")
    assert step == 2
    assert {f"test/{name}" for name in FIGURES} <= found.keys()
    answers = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()[before:]]
    assert len(answers) == 2
    assert {(answer["step"], answer["split"]) for answer in answers} == {(2, "test")}


def test_a_finished_run_is_not_overwritten(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert command(["fit", "--config", str(run.parent / "config.yaml")]) == 1
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize("callbacks", [[], [{"class_path": "RunCheckpoint"}]], ids=["none", "RunCheckpoint"])
def test_a_run_that_another_process_trains_is_refused(
    callbacks: list[dict[str, str]], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((run.parent / "config.yaml").read_text())
    config["trainer"] |= {"default_root_dir": str(tmp_path / "run"), "callbacks": callbacks}
    with locked(tmp_path / "run") as pid:
        assert main(["fit", "--config", write_config(tmp_path / "config.yaml", config)]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert f"distillkit fit: error: {tmp_path / 'run'} is in use: process {pid} on " in line
    assert {path.name for path in (tmp_path / "run").iterdir()} <= ALLOWED


@pytest.mark.parametrize(
    ("accelerator", "precision", "has_instructions", "expected"),
    [
        ("cpu", "bf16-mixed", False, {"precision": "32-true"}),
        ("cpu", "bf16-true", False, {"precision": "32-true"}),
        ("auto", "bf16-mixed", False, {"precision": "32-true"}),
        ("cpu", "bf16-mixed", True, {}),
        ("cpu", "32-true", False, {}),
        ("cuda", "bf16-mixed", False, {}),
    ],
)
def test_a_processor_without_bfloat16_trains_in_float32_and_says_so(
    accelerator, precision, has_instructions, expected, monkeypatch, caplog
):
    monkeypatch.setattr(launch, "has_native_matmul", lambda dtype, device: has_instructions)
    monkeypatch.setattr(launch, "default_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(logging.getLogger("distillkit"), "propagate", True)
    caplog.set_level("INFO", "distillkit")
    assert launch._runnable_precision(accelerator, precision) == expected
    assert len(caplog.records) == len(expected)
    assert all(f"{precision} becomes 32-true" in record.getMessage() for record in caplog.records)
