"""Held-out prompts with the student's answers before and after training, read from a run's `answers.jsonl`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillkit.errors import StoreError
from distillkit.run_folder import ANSWERS


@dataclass(frozen=True)
class Example:
    """A held-out prompt and three answers to it.

    Args:
        prompt: Text of the last turn.
        reference: The reference answer: the teacher's, or that of the data.
        before: The student's answer at the first validation.
        after: The student's answer at the last validation.
    """

    prompt: str
    reference: str
    before: str
    after: str


def examples(run: Path, count: int = 5, step: int | None = None) -> list[Example]:
    """The first held-out prompts of a run that were answered at its first and its last validation.

    Args:
        run: The run's folder.
        count: Limit on the number of examples.
        step: Optimizer step of the last validation; None is the last there was.

    Returns:
        At most `count` examples, in the order of the data; none if there was one validation, or none.

    Raises:
        StoreError: If `answers.jsonl` is damaged.
    """
    answers = [answer for _, answer in read_answers(run / ANSWERS) if answer.get("split", "val") == "val"]
    steps = sorted({answer["step"] for answer in answers})
    if step is not None:
        steps = [earlier for earlier in steps if earlier <= step] if step in steps else []
    if len(steps) < 2:
        return []
    before = {answer["prompt_id"]: answer for answer in answers if answer["step"] == steps[0]}
    after = [answer for answer in answers if answer["step"] == steps[-1] and answer["prompt_id"] in before]
    return [
        Example(answer["prompt"], answer["reference"], before[answer["prompt_id"]]["student"], answer["student"])
        for answer in after[:count]
    ]


def read_answers(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The whole lines of an `answers.jsonl`, each with its content; none if there is no such file.

    Raises:
        StoreError: If a line is damaged. A last line without an end, which a killed run leaves, is passed over.
    """
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True) if path.exists() else (), start=1):
        try:
            if line.endswith(b"\n"):
                yield line.decode(), dict(json.loads(line))
        except (ValueError, TypeError) as error:
            raise StoreError(f"{path}, line {number}, is damaged ({error}): correct it, or move the file.") from error
