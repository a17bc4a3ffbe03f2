"""Prompts of Reasoning Gym: tasks made by a program, whose answers can be checked exactly."""

import importlib.util
from typing import Any

from distillkit.data.records import Record, Source
from distillkit.errors import ConfigError


class ReasoningGym(Source):
    """Prompts of a task of Reasoning Gym, each with its answer (`pip install "distillkit[reasoning-gym]"`).

    Stojanovski et al. 2025, arXiv 2505.24760. `ReasoningGymAnswer` judges responses to them.

    Args:
        task: Name of the task, such as `basic_arithmetic`.
        size: Number of prompts, at least 1.
        seed: Of the first prompt; the n-th has the seed `seed` + n, so that training and held-out prompts need seeds
            that are at least `size` apart.
        settings: Further settings of the task, such as `{min_terms: 2}`.
        instruction: Text behind each question; empty for none.

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
    ) -> None:  # none of Source's own settings is one of these
        if size < 1:
            raise ConfigError(f"ReasoningGym.size must be at least 1, got {size}.")
        self.path = f"reasoning-gym:{task}:{seed}"
        self.task, self.size, self.seed, self.settings, self.instruction = task, size, seed, settings or {}, instruction

    def check(self) -> None:
        """Finds out whether there is such a task.

        Raises:
            ConfigError: If the library is not installed, or has no such task or setting.
        """
        tasks(self.task, self.size, self.seed, self.settings)

    def records(self) -> list[Record]:
        """The prompts, each with the answer as its response."""
        found = tasks(self.task, self.size, self.seed, self.settings)
        behind = f"\n\n{self.instruction}" if self.instruction else ""
        return [
            Record(
                (
                    {"role": "user", "content": f"{entry['question']}{behind}"},
                    {"role": "assistant", "content": f"<answer>{entry['answer']}</answer>"},
                ),
                f"{self.path} number {place}",
            )
            for place, entry in enumerate(found)
        ]

    @property
    def on_hub(self) -> bool:
        """No."""
        return False


def tasks(task: str, size: int, seed: int, settings: dict[str, Any]) -> Any:
    """The task's entries.

    Raises:
        ConfigError: If the library is not installed, or has no such task or setting.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ConfigError('ReasoningGym needs its library: pip install "distillkit[reasoning-gym]".')
    import reasoning_gym  # a second to import

    try:
        return reasoning_gym.create_dataset(task, size=size, seed=seed, **settings)
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigError(f"Reasoning Gym can't make the task {task!r} with {settings}: {error}") from error
