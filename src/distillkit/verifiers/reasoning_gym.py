"""Exact answers to tasks of Reasoning Gym."""

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from distillkit.data.reasoning_gym import tasks
from distillkit.errors import ConfigError, DataError
from distillkit.interfaces import Verifier
from distillkit.types import Prompt, Prompts, Response

_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)


class ReasoningGymAnswer(Verifier):
    """1 if a response has the answer to a task of Reasoning Gym, else 0, as the task's own check has it.

    The answer is what stands between the last `<answer>` and `</answer>`, or else the whole response. The settings are
    those of the prompts' source, `ReasoningGym`, so that the task is found by its question. Stojanovski et al. 2025,
    arXiv 2505.24760.

    Args:
        task: Name of the task.
        size: Number of the prompts, at least 1.
        seed: Seed of the prompts.
        settings: Further settings of the task.
        partial: Whether the check's own number is given, between 0 and 1, where it has a part right; else that is 0.

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
        """Refuses prompts that are not of this task.

        Raises:
            DataError: If one isn't.
        """
        for prompt in prompts:
            self._entry(prompt)

    def verify(self, prompts: Prompts, responses: Sequence[Response]) -> list[float]:
        """A number in [0, 1] for each response.

        Raises:
            DataError: If a prompt is not of this task.
        """
        found = []
        for prompt, response in zip(prompts, responses, strict=True):
            given = _ANSWER.findall(response.text)
            score = self._dataset.score_answer((given[-1] if given else response.text).strip(), self._entry(prompt))
            found.append(float(score) if self.partial else float(score >= 1.0))
        return found

    @cached_property
    def _dataset(self) -> Any:
        return tasks(self.task, self.size, self.seed, self.settings)

    @cached_property
    def _entries(self) -> dict[str, Any]:
        return {str(entry["question"]).strip(): entry for entry in self._dataset}

    def _entry(self, prompt: Prompt) -> Any:
        asked = str(prompt.messages[-1]["content"])
        entry = self._entries.get(asked.strip()) or self._entries.get(asked.rpartition("\n\n")[0].strip())
        if entry is None:
            raise DataError(
                f"ReasoningGymAnswer judges the {self.size} prompts of {self.task} with seed {self.seed}, and "
                f"{asked[:60]!r} is none of them: give it the settings of the prompts' source."
            )
        return entry
