"""Two responses to each prompt."""

from collections.abc import Mapping, Sequence

from distillkit.curators.brought import merged_generators
from distillkit.curators.single import StudentCurator, TeacherCurator
from distillkit.errors import ConfigError
from distillkit.interfaces import Curator, Generator
from distillkit.types import Prompts, Row


class PairedCurator(Curator):
    """Two responses to each prompt, by two curators; they stay together in a batch.

    Args:
        chosen: Writes the response that the student is pulled up on; None is `TeacherCurator()`.
        rejected: Writes the response that the student is pushed down on; None is `StudentCurator()`.

    Raises:
        ConfigError: If both write anew during training and at different times.
    """

    def __init__(self, chosen: Curator | None = None, rejected: Curator | None = None) -> None:
        super().__init__()
        self.chosen = TeacherCurator() if chosen is None else chosen
        self.rejected = StudentCurator() if rejected is None else rejected
        self.needs_reference = self.chosen.needs_reference or self.rejected.needs_reference
        moving = {part.rounds for part in (self.chosen, self.rejected)} - {"once"}
        if len(moving) > 1:
            raise ConfigError(
                f"PairedCurator.chosen and .rejected must have the same rounds unless one is `once`, got "
                f"{self.chosen.rounds} and {self.rejected.rounds}."
            )
        self._rounds: str | int = moving.pop() if moving else "once"

    @property
    def rounds(self) -> str | int:
        """Those of the part that writes anew."""
        return self._rounds

    @property
    def writers(self) -> frozenset[str]:
        """Those of both parts."""
        return self.chosen.writers | self.rejected.writers

    def brings(self) -> Mapping[str, Generator]:
        """Those of both parts."""
        return merged_generators(self.chosen, self.rejected)

    def prepare(self, prompts: Prompts, generators: Mapping[str, Generator]) -> None:
        """Prepares both parts."""
        self.chosen.prepare(prompts, generators)
        self.rejected.prepare(prompts, generators)

    def curate(self, prompts: Prompts, generators: Mapping[str, Generator]) -> Sequence[Row]:
        """The rows of both parts, prompt by prompt."""
        chosen = self.chosen.curate(prompts, generators)
        rejected = self.rejected.curate(prompts, generators)
        return [row for pair in zip(chosen, rejected, strict=True) for row in pair]
