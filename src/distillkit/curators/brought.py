"""Generators that curators bring with them."""

from collections.abc import Mapping

from distillkit.errors import ConfigError
from distillkit.interfaces import Curator, Generator


def models_of(curator: Curator) -> frozenset[str]:
    """The models of the run that a curator's writers write with."""
    brought, found = curator.brings(), set[str]()
    for writer in curator.writers:
        named = brought[writer].models if writer in brought else None
        found.update((writer,) if named is None else named)
    return frozenset(found)


def merged_generators(*curators: Curator) -> Mapping[str, Generator]:
    """The generators that several curators bring, by the name of the writer.

    Raises:
        ConfigError: If two of them bring different ones for one writer, whose responses could not be told apart.
    """
    found: dict[str, Generator] = {}
    for curator in curators:
        for name, generator in curator.brings().items():
            if found.setdefault(name, generator) is not generator:
                raise ConfigError(
                    f"Two curators bring a generator for the writer {name}: {type(found[name]).__name__} and "
                    f"{type(generator).__name__}. Use one of them in both places."
                )
    return found
