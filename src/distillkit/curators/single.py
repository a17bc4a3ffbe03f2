"""Curators with one writer."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from distillkit.curators.rounds import Rounds, parse_rounds
from distillkit.errors import DataError
from distillkit.interfaces import Curator, Generator
from distillkit.types import Prompt, Prompts, Response, Row, Sampling


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
        generator: Writes the responses; None is the run's own generator.

    Raises:
        ConfigError: If `rounds` is none of these, or `generator` can't draw as `sampling` says.
    """

    writer: ClassVar[str]

    def __init__(self, sampling: Sampling, rounds: Rounds, generator: Generator | None = None) -> None:
        super().__init__()
        self.sampling, self.generator = sampling, generator
        self._rounds = parse_rounds(type(self).__name__, rounds)
        if generator is not None:
            generator.check(sampling)

    @property
    def rounds(self) -> str | int:
        """As configured."""
        return self._rounds

    @property
    def writers(self) -> frozenset[str]:
        """The one writer."""
        return frozenset({self.writer})

    def brings(self) -> Mapping[str, Generator]:
        """Its own generator, if it has one."""
        return {} if self.generator is None else {self.writer: self.generator}

    def prepare(self, prompts: Prompts, generators: Mapping[str, Generator]) -> None:
        """Has everything written that is written once."""
        if self._rounds == "once":
            self.curate(prompts, generators)

    def curate(self, prompts: Prompts, generators: Mapping[str, Generator]) -> Sequence[Row]:
        """One row per prompt."""
        responses = self.respond(prompts, generators, self.sampling)
        return [self.row(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]

    def respond(self, prompts: Prompts, generators: Mapping[str, Generator], sampling: Sampling) -> Sequence[Response]:
        """One response per prompt, drawn as `sampling` says."""
        asked = prompts.at_round(0) if self._rounds == "once" else prompts
        return generators[self.writer].generate(asked, sampling)

    def row(self, prompt: Prompt, response: Response) -> Row:
        """A prompt with its response, which is what is trained on."""
        mask = (False,) * len(prompt.input_ids) + (True,) * len(response.token_ids)
        ended, blank = response.finish == "stop", not response.text.strip()
        return Row(prompt.input_ids + response.token_ids, mask, self.writer, prompt.id, ended, blank)


class TeacherCurator(SampledCurator):
    """A sample of the teacher.

    Args:
        sampling: How responses are drawn; None is temperature 0.8 and top-p 0.95, as in the code released with
            DistiLLM-2.
        rounds: How long a round lasts: `once`, `epoch`, `step`, or `{every: n}` optimizer steps.
        generator: Writes the responses; None is the run's own generator.

    Raises:
        ConfigError: If `rounds` is none of these.
    """

    writer: ClassVar[str] = "teacher"

    def __init__(
        self, sampling: Sampling | None = None, rounds: Rounds = "once", generator: Generator | None = None
    ) -> None:
        super().__init__(sampling or Sampling(), rounds, generator)


class StudentCurator(SampledCurator):
    """A sample of the student as it is when the round starts.

    Args:
        sampling: How responses are drawn; None is temperature 0.8 and top-p 0.95, as in the code released with
            DistiLLM-2.
        rounds: How long a round lasts: `once`, `epoch`, `step`, or `{every: n}` optimizer steps.
        generator: Writes the responses; None is the run's own generator.

    Raises:
        ConfigError: If `rounds` is none of these.
    """

    writer: ClassVar[str] = "student"

    def __init__(
        self, sampling: Sampling | None = None, rounds: Rounds = "epoch", generator: Generator | None = None
    ) -> None:
        super().__init__(sampling or Sampling(), rounds, generator)


def sampled_by_the_run(curator: Curator) -> list[Sampling]:
    """How the curators within `curator` have the run's own generator draw."""
    parts = [part for part in curator.modules() if isinstance(part, SampledCurator)]
    return [part.sampling for part in parts if part.generator is None]
