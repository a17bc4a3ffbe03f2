"""Prompts with the answers before and after training, from a run's answers."""

import json

import pytest

from distillkit.errors import StoreError
from distillkit.evaluation.examples import Example, examples


def write(run, *answers):
    lines = [
        {"step": step, "split": split, "prompt_id": name, "prompt": name.upper(), "reference": "r", "student": text}
        for step, split, name, text in answers
    ]
    run.joinpath("answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_first_and_the_last_validation_are_compared(tmp_path):
    steps = [(0, "bad"), (4, "better"), (8, "good")]
    write(tmp_path, *((step, "val", name, text + name) for step, text in steps for name in "abc"))
    assert examples(tmp_path, 2) == [Example("A", "r", "bada", "gooda"), Example("B", "r", "badb", "goodb")]
    assert len(examples(tmp_path)) == 3


def test_a_test_or_a_single_validation_is_no_example(tmp_path):
    assert examples(tmp_path) == []
    write(tmp_path, (0, "val", "a", "bad"), (8, "test", "a", "good"))
    assert examples(tmp_path) == []


def test_a_damaged_line_is_named_and_a_cut_one_is_passed_over(tmp_path):
    write(tmp_path, (0, "val", "a", "bad"), (8, "val", "a", "good"))
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"step": 9')
    assert [example.after for example in examples(tmp_path)] == ["good"]
    (tmp_path / "answers.jsonl").write_text("{}\n[1\n")
    with pytest.raises(StoreError, match="line 2, is damaged"):
        examples(tmp_path)


def test_the_last_validation_can_be_that_of_a_checkpoint(tmp_path):
    write(tmp_path, *((step, "val", "a", f"at {step}") for step in (0, 4, 8)))
    assert [example.after for example in examples(tmp_path, step=4)] == ["at 4"]
    assert examples(tmp_path, step=0) == []
    assert examples(tmp_path, step=5) == []
