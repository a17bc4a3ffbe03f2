"""Commands as they are entered: flags that need no value."""

import pytest

from distillkit.config.command import with_flag_values
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
