"""Curators with a single writer: the data, the teacher or the student."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from distillkit.curators.base import Rounds, parse_rounds
from distillkit.errors import DataError
from distillkit.interfaces import Curator, Generator
from distillkit.types import Prompt, Prompts, Response, Row, Sampling


class DatasetCurator(Curator):
    """The response that came with the prompt; in a conversation, every turn of the assistant."""

    needs_reference = True

    @property
    def rounds(self) -> str | int:
        return "once"

    @property
    def writers(self) -> frozenset[str]:
        return frozenset()

    def curate(self, prompts: Prompts, generators: Mapping[str, Generator]) -> Sequence[Row]:
        """One row per prompt.

        Raises:
            DataError: If a prompt came without a response.
        """
        for prompt in prompts:
            if not prompt.reference_ids:
                raise DataError(
                    f"DatasetCurator got a prompt without a response ({prompt.excerpt}): "
                    "give the data a response column, or use TeacherCurator."
                )
        return [Row(prompt.reference_ids, prompt.reference_mask, "dataset", prompt.id) for prompt in prompts]


class SampledCurator(Curator):
    """Base of curators in which one model generates every response.

    Args:
        sampling: Sampling of the responses.
        rounds: How long a round lasts: `once`, `epoch`, `step`, or `{every: n}` optimizer steps.
        generator: Generates the responses; None is the run's generator.

    Raises:
        ConfigError: If `rounds` is none of these, or `generator` does not support `sampling`.
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
        """The configured rounds."""
        return self._rounds

    @property
    def writers(self) -> frozenset[str]:
        """The single writer."""
        return frozenset({self.writer})

    def own_generators(self) -> Mapping[str, Generator]:
        """The configured generator, if there is one."""
        return {} if self.generator is None else {self.writer: self.generator}

    def prepare(self, prompts: Prompts, generators: Mapping[str, Generator]) -> None:
        """Generates all responses if they are generated once."""
        if self._rounds == "once":
            self.curate(prompts, generators)

    def curate(self, prompts: Prompts, generators: Mapping[str, Generator]) -> Sequence[Row]:
        """One row per prompt."""
        responses = self.respond(prompts, generators, self.sampling)
        return [self.row(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]

    def respond(self, prompts: Prompts, generators: Mapping[str, Generator], sampling: Sampling) -> Sequence[Response]:
        """Generates one response per prompt with the given sampling."""
        prompts = prompts.at_round(0) if self._rounds == "once" else prompts
        return generators[self.writer].generate(prompts, sampling)

    def row(self, prompt: Prompt, response: Response) -> Row:
        """A training row: the prompt with its response, trained on the response."""
        mask = (False,) * len(prompt.input_ids) + (True,) * len(response.token_ids)
        ended, blank = response.finish == "stop", not response.text.strip()
        return Row(prompt.input_ids + response.token_ids, mask, self.writer, prompt.id, ended, blank, response.pending)


class TeacherCurator(SampledCurator):
    """Responses sampled from the teacher.

    Args:
        sampling: Sampling of the responses; None is temperature 0.8 and top-p 0.95, as in the code released with
            DistiLLM-2.
        rounds: How long a round lasts: `once`, `epoch`, `step`, or `{every: n}` optimizer steps.
        generator: Generates the responses; None is the run's generator.

    Raises:
        ConfigError: If `rounds` is none of these.
    """

    writer: ClassVar[str] = "teacher"

    def __init__(
        self, sampling: Sampling | None = None, rounds: Rounds = "once", generator: Generator | None = None
    ) -> None:
        super().__init__(sampling or Sampling(), rounds, generator)


class StudentCurator(SampledCurator):
    """Responses sampled from the student as it is when the round starts.

    Args:
        sampling: Sampling of the responses; None is temperature 0.8 and top-p 0.95, as in the code released with
            DistiLLM-2.
        rounds: How long a round lasts: `once`, `epoch`, `step`, or `{every: n}` optimizer steps.
        generator: Generates the responses; None is the run's generator.

    Raises:
        ConfigError: If `rounds` is none of these.
    """

    writer: ClassVar[str] = "student"

    def __init__(
        self, sampling: Sampling | None = None, rounds: Rounds = "epoch", generator: Generator | None = None
    ) -> None:
        super().__init__(sampling or Sampling(), rounds, generator)


def run_samplings(curator: Curator) -> list[Sampling]:
    """The samplings that the curators within `curator` use with the run's generator."""
    parts = [part for part in curator.modules() if isinstance(part, SampledCurator)]
    return [part.sampling for part in parts if part.generator is None]
