"""What the verbs do, called from Python."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from distillkit.errors import ConfigError
from distillkit.workflows import curate, evaluate
from helpers.runs import QUIET, save_models, write_prompts

PROMPTS, HELD_OUT = 4, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, and a configuration that trains one of them on the other's responses."""
    root = tmp_path_factory.mktemp("calls")
    teacher, student = save_models(root)
    config: dict[str, Any] = {
        "trainer": {"default_root_dir": str(root / "run"), **QUIET},
        "model": {
            "student": {"source": student},
            "teacher": {"class_path": "TransformersTeacher", "init_args": {"source": teacher}},
            "loss": {"class_path": "ForwardKL"},
            "curator": {"class_path": "TeacherCurator", "init_args": {"sampling": {"max_new_tokens": 4}}},
            "answers": {"temperature": 0.0, "max_new_tokens": 4},
        },
        "data": {
            "train": write_prompts(root / "train.jsonl", PROMPTS),
            "val": write_prompts(root / "val.jsonl", HELD_OUT),
        },
    }
    (root / "run.yaml").write_text(yaml.safe_dump(config))
    return root


def test_curate_writes_and_says_how_much(folder: Path) -> None:
    done = curate(folder / "run.yaml")
    assert done.num_responses == PROMPTS + HELD_OUT
    assert done.num_tokens >= done.num_responses
    assert done.report == [
        f"{folder / 'run' / 'responses'}: {PROMPTS + HELD_OUT} responses by the teacher, 0 of them were there already"
    ]
    assert curate(folder / "run.yaml").num_responses == 0, "they are in the store"


def test_evaluate_gives_what_it_writes(folder: Path, tmp_path: Path) -> None:
    done = evaluate(folder / "run.yaml", arguments=[f"--out={tmp_path / 'found'}"])
    assert done.folder == tmp_path / "found"
    assert done.metrics["kl"] > 0
    written = yaml.safe_load((done.folder / "evaluation.json").read_text())
    assert written["metrics"] == dict(done.metrics)
    assert written["num_prompts"] == HELD_OUT


def test_a_setting_that_is_none_is_refused_as_on_the_command_line(folder: Path) -> None:
    with pytest.raises(ConfigError, match="unknown key splits"):
        evaluate(folder / "run.yaml", arguments=["--splits=test"])
