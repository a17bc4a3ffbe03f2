"""The template of curators around another one."""

from collections.abc import Mapping

from distillkit.interfaces import Curator, Generator
from distillkit.types import Prompts


class WrappedCurator(Curator):
    """Template: another curator's rounds, writers and generators; a subclass writes `curate`.

    Args:
        curator: The other curator.
    """

    def __init__(self, curator: Curator) -> None:
        super().__init__()
        self.curator = curator
        self.needs_reference = curator.needs_reference

    @property
    def rounds(self) -> str | int:
        """Those of the other curator."""
        return self.curator.rounds

    @property
    def writers(self) -> frozenset[str]:
        """Those of the other curator."""
        return self.curator.writers

    def brings(self) -> Mapping[str, Generator]:
        """Those of the other curator."""
        return self.curator.brings()

    def prepare(self, prompts: Prompts, generators: Mapping[str, Generator]) -> None:
        """Prepares the other curator."""
        self.curator.prepare(prompts, generators)
