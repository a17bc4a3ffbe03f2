"""Shared code of curators: parsing of `rounds`, their own generators, and the wrapper around another curator."""

from collections.abc import Mapping

from distillkit.errors import ConfigError
from distillkit.interfaces import Curator, Generator, Schedule
from distillkit.types import Prompts

Rounds = str | dict[str, int]


def parse_rounds(name: str, rounds: Rounds) -> str | int:
    """Returns the length of a round: `once`, `epoch`, or a number of optimizer steps.

    Args:
        name: Name of the curator in the error message.
        rounds: `once`, `epoch`, `step`, or `{every: n}` with n optimizer steps.

    Raises:
        ConfigError: If `rounds` is none of these.
    """
    if rounds in ("once", "epoch"):
        return str(rounds)
    if rounds == "step":
        return 1
    if isinstance(rounds, dict) and rounds.keys() == {"every"} and rounds["every"] >= 1:
        return rounds["every"]
    raise ConfigError(
        f"{name}.rounds must be once, epoch, step or {{every: n}} with n optimizer steps, got {rounds!r}."
    )


def models_of(curator: Curator) -> frozenset[str]:
    """Names of the run's models that a curator's responses are generated with."""
    own_generators, models = curator.own_generators(), set[str]()
    for writer in curator.writers:
        needed = own_generators[writer].needs_models if writer in own_generators else None
        models.update((writer,) if needed is None else needed)
    return frozenset(models)


def merged_generators(*curators: Curator) -> Mapping[str, Generator]:
    """The own generators of several curators, by the name of the writer.

    Raises:
        ConfigError: If two of them have different generators for the same writer, whose responses could not be told
            apart.
    """
    merged: dict[str, Generator] = {}
    for curator in curators:
        for name, generator in curator.own_generators().items():
            if merged.setdefault(name, generator) is not generator:
                raise ConfigError(
                    f"Two curators have different generators for the writer {name}: {type(merged[name]).__name__} and "
                    f"{type(generator).__name__}. Use the same generator in both, or DataPairs for pairs of the data."
                )
    return merged


class WrappedCurator(Curator):
    """Base of curators around another one, with its rounds, writers and generators; subclasses define `curate`.

    Args:
        curator: The wrapped curator.
    """

    def __init__(self, curator: Curator) -> None:
        super().__init__()
        self.curator = curator
        self.needs_reference = curator.needs_reference

    @property
    def rounds(self) -> str | int:
        """The rounds of the wrapped curator."""
        return self.curator.rounds

    @property
    def writers(self) -> frozenset[str]:
        """The writers of the wrapped curator."""
        return self.curator.writers

    def own_generators(self) -> Mapping[str, Generator]:
        """The generators of the wrapped curator."""
        return self.curator.own_generators()

    def schedules(self) -> Mapping[str, Schedule]:
        """The schedules of the wrapped curator."""
        return self.curator.schedules()

    def prepare(self, prompts: Prompts, generators: Mapping[str, Generator]) -> None:
        """Prepares the wrapped curator."""
        self.curator.prepare(prompts, generators)
