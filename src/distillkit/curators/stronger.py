"""A curator whose writer is neither the student nor the teacher."""

from typing import ClassVar

from distillkit.curators.rounds import Rounds
from distillkit.curators.single import SampledCurator
from distillkit.errors import ConfigError
from distillkit.interfaces import Generator
from distillkit.types import Sampling


class StrongerCurator(SampledCurator):
    """A sample of another model than the teacher: a server's, one in this process, or responses from a file.

    Args:
        generator: Writes the responses with a model of its own, such as `ServerGenerator`, `LocalGenerator` or
            `FileGenerator`.
        sampling: How responses are drawn; None is temperature 0.8 and top-p 0.95.
        rounds: How long a round lasts: `once`, `epoch`, `step`, or `{every: n}` optimizer steps.

    Raises:
        ConfigError: If `rounds` is none of these, or the generator writes with a model of the run.
    """

    writer: ClassVar[str] = "stronger"

    def __init__(self, generator: Generator, sampling: Sampling | None = None, rounds: Rounds = "once") -> None:
        super().__init__(sampling or Sampling(), rounds, generator)
        if generator.models is None:
            raise ConfigError(
                f"StrongerCurator.generator must bring a model of its own, and {type(generator).__name__} writes with "
                "the run's: use ServerGenerator, LocalGenerator or FileGenerator."
            )
