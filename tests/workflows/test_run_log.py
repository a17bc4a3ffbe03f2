"""The log file of a run."""

import logging
from pathlib import Path

from distillkit.workflows.logs import run_log
from helpers.runs import QUIET, command, save_models, write_config

_log = logging.getLogger("distillkit.tests")


def test_a_run_keeps_its_log_with_each_row_left_out_and_why(tmp_path: Path) -> None:
    save_models(tmp_path)
    rows = ['{"prompt": "one", "response": "two"}', '{"prompt": "three", "response": "four"}']
    bad = ['{"prompt": 3}'] * 25
    (tmp_path / "train.jsonl").write_text("\n".join([*rows, rows[0], *rows[1:], *bad]) + "\n")
    settings = {
        "trainer": QUIET | {"default_root_dir": str(tmp_path / "run"), "max_steps": 1},
        "model": {"student": {"source": str(tmp_path / "student")}, "loss": "CrossEntropy"},
        "data": {"train": str(tmp_path / "train.jsonl"), "batch_size": 1, "on_error": "skip"},
    }
    config = write_config(tmp_path / "run.yaml", settings)
    assert command(["fit", "--config", config]) == 0
    log = (tmp_path / "run" / "run.log").read_text()
    assert (
        f"left out: {tmp_path / 'train.jsonl'} line 3 has the same prompt as {tmp_path / 'train.jsonl'} line 1" in log
    )
    assert "train.jsonl: 25 of 29 rows are left out" in log
    assert log.count(", prompt must be a text, got 3") == 25, "the terminal lists twenty"
    assert command(["fit", "--config", config]) == 1, "the folder holds a run"
    assert (tmp_path / "run" / "run.log").read_text() == log


def test_a_log_file_that_cant_be_written_is_given_up(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    logging.getLogger("distillkit").setLevel(logging.INFO)
    with run_log(tmp_path / "file" / "run.log"):
        _log.info("first")
        _log.info("second")
    assert (tmp_path / "file").read_text() == ""
