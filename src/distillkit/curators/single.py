"""Curators with one writer."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from distillkit.curators.rounds import Rounds, parse_rounds
from distillkit.errors import DataError
from distillkit.interfaces import Curator, Generator
from distillkit.types import Prompts, Row, Sampling


class DatasetCurator(Curator):
    """The response that came with the prompt; in a conversation, every turn that an assistant wrote."""

    needs_reference = True

    @property
    def rounds(self) -> str | int:
        """`once`."""
        return "once"

    @property
    def writers(self) -> frozenset[str]:
        """None."""
        return frozenset()

    def curate(self, prompts: Prompts, generators: Mapping[str, Generator]) -> Sequence[Row]:
        """One row per prompt.

        Raises:
            DataError: If a prompt came without a response.
        """
        for prompt in prompts:
            if not prompt.reference_ids:
                raise DataError(
                    f"DatasetCurator found a prompt without a response ({prompt.messages[-1]['content'][:60]!r}): "
                    "give the data a response column, or use TeacherCurator."
                )
        return [Row(prompt.reference_ids, prompt.reference_mask, "dataset", prompt.id) for prompt in prompts]


class SampledCurator(Curator):
    """Template: one model writes every response.

    Args:
        sampling: How responses are drawn.
        rounds: How long a round lasts: `once`, `epoch`, `step`, or `{every: n}` optimizer steps.
    """

    writer: ClassVar[str]

    def __init__(self, sampling: Sampling, rounds: Rounds) -> None:
        super().__init__()
        self.sampling = sampling
        self._rounds = parse_rounds(type(self).__name__, rounds)

    @property
    def rounds(self) -> str | int:
        """As configured."""
        return self._rounds

    @property
    def writers(self) -> frozenset[str]:
        """The one writer."""
        return frozenset({self.writer})

    def prepare(self, prompts: Prompts, generators: Mapping[str, Generator]) -> None:
        """Has everything written that is written once."""
        if self._rounds == "once":
            self.curate(prompts, generators)

    def curate(self, prompts: Prompts, generators: Mapping[str, Generator]) -> Sequence[Row]:
        """One row per prompt."""
        asked = prompts.at_round(0) if self._rounds == "once" else prompts
        responses = generators[self.writer].generate(asked, self.sampling)
        return [
            Row(
                prompt.input_ids + response.token_ids,
                (False,) * len(prompt.input_ids) + (True,) * len(response.token_ids),
                self.writer,
                prompt.id,
            )
            for prompt, response in zip(prompts, responses, strict=True)
        ]


class TeacherCurator(SampledCurator):
    """A sample of the teacher.

    Args:
        sampling: How responses are drawn; None is temperature 0.8 and top-p 0.95, as in the code released with
            DistiLLM-2.
        rounds: How long a round lasts: `once`, `epoch`, `step`, or `{every: n}` optimizer steps.

    Raises:
        ConfigError: If `rounds` is none of these.
    """

    writer: ClassVar[str] = "teacher"

    def __init__(self, sampling: Sampling | None = None, rounds: Rounds = "once") -> None:
        super().__init__(sampling or Sampling(), rounds)


class StudentCurator(SampledCurator):
    """A sample of the student as it is when the round starts.

    Args:
        sampling: How responses are drawn; None is temperature 0.8 and top-p 0.95, as in the code released with
            DistiLLM-2.
        rounds: How long a round lasts: `once`, `epoch`, `step`, or `{every: n}` optimizer steps.

    Raises:
        ConfigError: If `rounds` is none of these.
    """

    writer: ClassVar[str] = "student"

    def __init__(self, sampling: Sampling | None = None, rounds: Rounds = "epoch") -> None:
        super().__init__(sampling or Sampling(), rounds)
