"""Verifier for tasks of Reasoning Gym, which checks answers with the task's own program."""

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from distillkit.data.reasoning_gym import tasks
from distillkit.errors import ConfigError, DataError
from distillkit.interfaces import Verifier
from distillkit.types import Prompt, Prompts, Response
from distillkit.verifiers.final_answer import final_answer

_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)


class ReasoningGymAnswer(Verifier):
    """1 if a response has the correct answer to a task of Reasoning Gym, else 0.

    Stojanovski et al. 2025, arXiv 2505.24760. The answer is the text between the last `<answer>` and `</answer>`, or
    the whole response if there is none, without reasoning in `<think>…</think>`. The settings must equal those of the
    prompts' source, `ReasoningGym`, because tasks are looked up by their question.

    Args:
        task: Name of the task.
        size: Number of prompts, at least 1.
        seed: Seed of the prompts.
        settings: Further settings of the task.
        partial: Whether to give partial credit: the task's score between 0 and 1 instead of 0 for a partly correct
            answer.

    Raises:
        ConfigError: If `size` is below 1.
    """

    def __init__(
        self,
        task: str,
        size: int,
        seed: int = 0,
        settings: dict[str, Any] | None = None,
        partial: bool = False,
    ) -> None:
        if size < 1:
            raise ConfigError(f"ReasoningGymAnswer.size must be at least 1, got {size}.")
        self.task, self.size, self.seed, self.settings, self.partial = task, size, seed, settings or {}, partial

    def check(self, prompts: Prompts) -> None:
        """Checks that every prompt belongs to this task.

        Raises:
            DataError: If a prompt does not.
        """
        for prompt in prompts:
            self._entry(prompt)

    def verify(self, prompts: Prompts, responses: Sequence[Response]) -> list[float]:
        """A number in [0, 1] for each response.

        Raises:
            DataError: If a prompt does not belong to this task.
        """
        scores = []
        for prompt, response in zip(prompts, responses, strict=True):
            text = final_answer(response.text)
            answers = _ANSWER.findall(text)
            answer = (answers[-1] if answers else text).strip()
            score = self._dataset.score_answer(answer, self._entry(prompt))
            scores.append(float(score) if self.partial else float(score >= 1.0))
        return scores

    @cached_property
    def _dataset(self) -> Any:
        return tasks(self.task, self.size, self.seed, self.settings)

    @cached_property
    def _entries(self) -> dict[str, Any]:
        return {str(entry["question"]).strip(): entry for entry in self._dataset}

    def _entry(self, prompt: Prompt) -> Any:
        question = str(prompt.messages[-1]["content"])
        entry = self._entries.get(question.strip()) or self._entries.get(question.rpartition("\n\n")[0].strip())
        if entry is None:
            raise DataError(
                f"ReasoningGymAnswer checks answers to the {self.size} prompts of {self.task} with seed {self.seed}, "
                f"and {question[:60]!r} is none of them: use the same settings as in the prompts' source."
            )
        return entry
