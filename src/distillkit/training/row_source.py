"""The interface through which the data module uses the training module."""

from typing import Protocol

from distillkit.rollouts.rounds import RoundRunner
from distillkit.types import Prompts, Row, Tokenizer


class RowSource(Protocol):
    """The training module as the data module sees it: it makes rows of the prompts."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The student's tokenizer."""

    @property
    def rounds(self) -> RoundRunner:
        """The rounds of the run."""

    def needs_reference(self, split: str) -> str:
        """The part that needs the responses that come with the prompts of a split (`train`, `val`, `test`), or `""`."""

    def check_held_out(self, prompts: Prompts) -> None:
        """Refuses held-out prompts on which the student can't be measured."""

    def reference_rows(self, prompts: Prompts) -> list[list[Row]]:
        """The rows of each held-out prompt: its reference response first."""

    def teardown(self, stage: str) -> None:
        """Stops the generation of the next round."""
