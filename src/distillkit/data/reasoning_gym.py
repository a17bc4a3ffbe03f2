"""Prompts of Reasoning Gym: procedurally generated tasks whose answers can be checked exactly."""

import importlib.util
from typing import Any

from distillkit.errors import ConfigError, check_range
from distillkit.interfaces import PromptSource
from distillkit.types import Record


class ReasoningGym(PromptSource):
    """Prompts of a task of Reasoning Gym, each with its answer (`pip install "distillkit[reasoning-gym]"`).

    Stojanovski et al. 2025, arXiv 2505.24760. `ReasoningGymAnswer` judges responses to them.

    Args:
        task: Name of the task, such as `basic_arithmetic`.
        size: Number of prompts, at least 1.
        seed: Seed of the first prompt. The n-th uses `seed` + n, so training and held-out prompts need seeds that
            are at least `size` apart.
        settings: Further arguments of the task, such as `{min_terms: 2}`.
        instruction: Text appended to each question; empty for none.

    Raises:
        ConfigError: If `size` is below 1.
    """

    def __init__(
        self,
        task: str,
        size: int,
        seed: int = 0,
        settings: dict[str, Any] | None = None,
        instruction: str = "Give the final answer between <answer> and </answer>.",
    ) -> None:
        check_range("ReasoningGym.size", size, 1)
        self.path = f"reasoning-gym:{task}:{seed}"
        self.task, self.size, self.seed, self.settings, self.instruction = task, size, seed, settings or {}, instruction

    def check(self) -> None:
        """Checks that the task exists.

        Raises:
            ConfigError: If the library is not installed, or has no such task or setting.
        """
        tasks(self.task, self.size, self.seed, self.settings)

    def records(self) -> list[Record]:
        """The prompts, each with the answer as its response."""
        entries = tasks(self.task, self.size, self.seed, self.settings)
        suffix = f"\n\n{self.instruction}" if self.instruction else ""
        return [
            Record(
                (
                    {"role": "user", "content": f"{entry['question']}{suffix}"},
                    {"role": "assistant", "content": f"<answer>{entry['answer']}</answer>"},
                ),
                f"{self.path} number {index}",
            )
            for index, entry in enumerate(entries)
        ]


def tasks(task: str, size: int, seed: int, settings: dict[str, Any]) -> Any:
    """The entries of a task, as the library's dataset, which also scores answers.

    Raises:
        ConfigError: If the library is not installed, or has no such task or setting.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ConfigError('ReasoningGym needs its library: pip install "distillkit[reasoning-gym]".')
    import reasoning_gym  # takes a second to import

    try:
        return reasoning_gym.create_dataset(task, size=size, seed=seed, **settings)
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigError(f"Reasoning Gym can't make the task {task!r} with {settings}: {error}") from error
