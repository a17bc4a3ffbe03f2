"""Commands as they are entered: flags that need no value, sources that are named by their path."""

from pathlib import Path

import pytest

from distillkit.config.command import with_flag_values, with_source_paths
from distillkit.workflows.curation import CurationTrainer
from distillkit.workflows.evaluation import EvaluationTrainer


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--overwrite"], ["--overwrite=true"]),
        (["--overwrite", "--out", "x"], ["--overwrite=true", "--out", "x"]),
        (["--overwrite", "false"], ["--overwrite", "false"]),
        (["--overwrite=false"], ["--overwrite=false"]),
        (["--samples", "2"], ["--samples", "2"]),
    ],
)
def test_a_flag_alone_is_true(arguments: list[str], expected: list[str]) -> None:
    assert with_flag_values(arguments, EvaluationTrainer.evaluate) == expected


def test_the_flags_are_those_of_the_verb() -> None:
    assert with_flag_values(["--score", "--overwrite"], CurationTrainer.curate) == ["--score=true", "--overwrite"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data.train", "a.jsonl"], ["--data.train", "a.jsonl"]),
        (
            ["--data.train", "a.jsonl", "--data.train.limit=1", "--data.val=b.jsonl"],
            ["--data.train.path", "a.jsonl", "--data.train.limit=1", "--data.val=b.jsonl"],
        ),
        (["--data.val.limit", "1", "--data.val=b.jsonl"], ["--data.val.limit", "1", "--data.val.path=b.jsonl"]),
        (["--data.train=MyPrompts", "--data.train.num=1"], ["--data.train=MyPrompts", "--data.train.num=1"]),
        (["--data.train=my.Prompts", "--data.train.num=1"], ["--data.train=my.Prompts", "--data.train.num=1"]),
        (["--data.train=MyFolder", "--data.train.limit=1"], ["--data.train.path=MyFolder", "--data.train.limit=1"]),
    ],
)
def test_a_path_and_a_setting_of_one_source_go_together(
    arguments: list[str], expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "MyFolder").mkdir()
    monkeypatch.chdir(tmp_path)
    assert with_source_paths(arguments) == expected
