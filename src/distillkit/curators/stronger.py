"""Responses of a third model, neither the student nor the teacher."""

from typing import ClassVar

from distillkit.curators.base import Rounds
from distillkit.curators.single import SampledCurator
from distillkit.errors import ConfigError
from distillkit.interfaces import Generator
from distillkit.types import Sampling


class StrongerCurator(SampledCurator):
    """Responses of another model than the teacher: on a server, in this process, or from a file.

    Args:
        generator: Generates the responses with a model outside the run, such as `ServerGenerator`, `LocalGenerator` or
            `FileGenerator`.
        sampling: Sampling of the responses; None is temperature 0.8 and top-p 0.95.
        rounds: How long a round lasts: `once`, `epoch`, `step`, or `{every: n}` optimizer steps.

    Raises:
        ConfigError: If `rounds` is none of these, or the generator uses a model of the run.
    """

    writer: ClassVar[str] = "stronger"

    def __init__(self, generator: Generator, sampling: Sampling | None = None, rounds: Rounds = "once") -> None:
        super().__init__(sampling or Sampling(), rounds, generator)
        if generator.needs_models is None:
            raise ConfigError(
                f"StrongerCurator.generator must use a model outside the run, and {type(generator).__name__} generates "
                "with the run's: use ServerGenerator, LocalGenerator or FileGenerator."
            )
