"""A source of prompts: questions of arithmetic, each with its answer."""

from random import Random

from distillkit.errors import ConfigError
from distillkit.interfaces import PromptSource
from distillkit.types import Record


class MyPlugin(PromptSource):
    """Sums of two numbers, as questions with their answers.

    Args:
        num_prompts: Number of prompts, at least 1.
        largest: Largest number in a sum, at least 1.
        seed: Seed of the numbers.

    Raises:
        ConfigError: If a number is below 1.
    """

    def __init__(self, num_prompts: int = 100, largest: int = 99, seed: int = 0) -> None:
        for name, value in {"num_prompts": num_prompts, "largest": largest}.items():
            if value < 1:
                raise ConfigError(f"MyPlugin.{name} must be at least 1, got {value}.")
        self.path = f"my-plugin:{largest}:{seed}"  # its name in messages and in the model card
        self.num_prompts, self.largest, self.seed = num_prompts, largest, seed

    def records(self) -> list[Record]:
        """Returns the conversations, the same for the same seed."""
        random = Random(self.seed)
        records = []
        for index in range(self.num_prompts):
            first, second = random.randint(0, self.largest), random.randint(0, self.largest)
            question = {"role": "user", "content": f"What is {first} + {second}?"}
            answer = {"role": "assistant", "content": f"{first + second}"}
            records.append(Record((question, answer), f"{self.path} number {index}"))
        return records
