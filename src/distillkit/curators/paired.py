"""Pairs of responses: two to each prompt, by two curators or from the data."""

from collections.abc import Mapping, Sequence

from distillkit.curators.base import merged_generators
from distillkit.curators.single import StudentCurator, TeacherCurator
from distillkit.errors import ConfigError, DataError
from distillkit.interfaces import Curator, Generator
from distillkit.losses.token import REJECTED
from distillkit.types import Prompts, Row


class PairedCurator(Curator):
    """Two responses to each prompt, by two curators. Both rows of a pair are in the same batch.

    Args:
        chosen: Curator of the first response, whose probability a contrastive loss is to raise; None is
            `TeacherCurator()`.
        rejected: Curator of the second response, whose probability it is to lower; None is `StudentCurator()`.
            Losses go by the writer of a response, not by these names: only the student's own are lowered
            (`losses.side_of`).

    Raises:
        ConfigError: If both regenerate during training at different intervals.
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
        """The rounds of the part that regenerates; `once` if none does."""
        return self._rounds

    @property
    def writers(self) -> frozenset[str]:
        """The writers of both parts."""
        return self.chosen.writers | self.rejected.writers

    def own_generators(self) -> Mapping[str, Generator]:
        """The own generators of both parts."""
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


class DataPairs(Curator):
    """The better and the worse response of each row of preference data (`chosen`, `rejected`).

    Trained on are the last answers. A contrastive loss raises the probability of the better one and lowers that of the
    worse one, as if the student had written it (`losses.side_of`).
    """

    needs_reference = True

    @property
    def rounds(self) -> str | int:
        return "once"

    @property
    def writers(self) -> frozenset[str]:
        return frozenset()

    def prepare(self, prompts: Prompts, generators: Mapping[str, Generator]) -> None:
        """Refuses prompts without a pair.

        Raises:
            DataError: If a prompt came without two responses.
        """
        missing = [prompt for prompt in prompts if not prompt.rejected_ids]
        if missing:
            raise DataError(
                f"DataPairs needs two responses to each prompt, and {len(missing)} of {len(prompts)} have none, such "
                f"as {missing[0].origin or missing[0].excerpt}: write a chosen and a rejected response, or use another "
                "curator, such as PairedCurator."
            )

    def curate(self, prompts: Prompts, generators: Mapping[str, Generator]) -> Sequence[Row]:
        """Two rows per prompt."""
        self.prepare(prompts, generators)
        rows = []
        for prompt in prompts:
            for writer, ids in (("dataset", prompt.reference_ids), (REJECTED, prompt.rejected_ids)):
                start = len(prompt.input_ids)
                mask = tuple(index >= start for index in range(len(ids)))
                rows.append(Row(ids, mask, writer, prompt.id))
        return rows
