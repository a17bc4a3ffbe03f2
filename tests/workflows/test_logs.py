"""Who sets up the log: the command, and nothing that is imported or called from Python."""

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distillkit.cli.main import main
from distillkit.comparison.plan import read
from distillkit.comparison.side_by_side import check
from distillkit.workflows import curate, evaluate
from helpers.runs import QUIET, save_models, write_config, write_prompts

RANK_ZERO = "lightning.pytorch.utilities.rank_zero"
NAMES = ("", "distillkit", "lightning", "lightning.pytorch", "lightning.fabric", RANK_ZERO)


def state(name: str) -> tuple[Any, ...]:
    log = logging.getLogger(name or None)
    return (*log.handlers, *log.filters, log.level, log.propagate, log.disabled)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("logs")
    teacher, student = save_models(root)
    settings = {
        "trainer": QUIET | {"default_root_dir": str(root / "run"), "max_epochs": 1},
        "model": {
            "student": {"source": student},
            "teacher": {"class_path": "TransformersTeacher", "init_args": {"source": teacher, "dtype": "float32"}},
            "loss": {"class_path": "SkewKL"},
            "curator": {"class_path": "TeacherCurator", "init_args": {"sampling": {"max_new_tokens": 4}}},
            "answers": {"temperature": 0.0, "max_new_tokens": 4},
        },
        "data": {
            "train": write_prompts(root / "train.jsonl", 2),
            "val": write_prompts(root / "val.jsonl", 1),
            "batch_size": 2,
        },
    }
    return write_config(root / "config.yaml", settings)


def compared(config: str) -> None:
    """The check of a comparison, which builds a trainer for each method."""
    folder = Path(config).parent
    plan = {"common": {"base": "config.yaml"}, "out": str(folder / "comparison"), "seeds": [0], "budget": {"steps": 1}}
    methods = {"methods": {"a": {"model": {"loss": {"class_path": "SkewKL"}}}}}
    check(read(write_config(folder / "compare.yaml", plan | methods)))


CALLS: dict[str, Callable[[str], object]] = {"curate": curate, "evaluate": evaluate, "compare": compared}


@pytest.mark.parametrize("call", CALLS)
def test_calls_from_python_leave_the_log_to_the_program(call: str, config: str) -> None:
    before = {name: state(name) for name in NAMES}
    CALLS[call](config)
    assert {name: state(name) for name in NAMES} == before


def test_importing_the_package_leaves_the_log_to_the_program() -> None:
    code = """
import importlib, logging, pkgutil, lightning.pytorch.cli, transformers
def state(name):
    log = logging.getLogger(name or None)
    return (log.handlers, log.filters, log.level, log.propagate)
before = [state(name) for name in {names}]
import distillkit
for module in pkgutil.walk_packages(distillkit.__path__, "distillkit."):
    if "templates" not in module.name and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
assert [state(name) for name in {names}] == before
"""
    subprocess.run([sys.executable, "-c", code.replace("{names}", repr(NAMES))], check=True)


def test_the_command_shows_the_log(config: str, capfd: pytest.CaptureFixture[str]) -> None:
    try:
        assert main(["validate", "--config", config]) == 0
        (handler,) = logging.getLogger("distillkit").handlers
        assert type(handler).__name__ == "RichHandler"
        assert "val: 1 prompts" in capfd.readouterr().out
    finally:
        logging.getLogger(RANK_ZERO).filters.clear()
