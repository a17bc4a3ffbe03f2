"""Responses that are looked at before they are trained on."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from distillkit.curators.filters import Empty, Repeated, ResponseFilter, Truncated
from distillkit.curators.wrapped import WrappedCurator
from distillkit.errors import ConfigError, DataError
from distillkit.generators.stored import elsewhere
from distillkit.interfaces import Curator, Generator
from distillkit.types import Prompts, Row

_log = logging.getLogger(__name__)


class FilteredCurator(WrappedCurator):
    """Another curator's rows, of which those are not trained on that a filter refuses.

    A prompt of several rows is left out as a whole if one of them is refused. It keeps its place in the round, and so
    does every other prompt. The log says how many rows each filter refused; a row counts for the first one that does.
    Of responses that other processes write, which are not here yet, nothing is said.

    Args:
        curator: The other curator.
        filters: What responses are refused for; None is `Empty`, `Truncated` and `Repeated`.

    Raises:
        ConfigError: If `filters` is an empty list.
    """

    def __init__(self, curator: Curator, filters: list[ResponseFilter] | None = None) -> None:
        super().__init__(curator)
        if filters is not None and not filters:
            raise ConfigError("FilteredCurator.filters is empty: name some, or leave the curator around the other out.")
        self.filters: list[ResponseFilter] = [Empty(), Truncated(), Repeated()] if filters is None else filters

    def curate(self, prompts: Prompts, generators: Mapping[str, Generator]) -> Sequence[Row]:
        """The other curator's rows; the mask of each row of a refused prompt is False everywhere.

        Raises:
            DataError: If every prompt of the round is refused.
        """
        rows = self.curator.curate(prompts, generators)
        size = len(rows) // len(prompts)
        absent = {name for _, name in elsewhere(generators.values())}
        reasons: Counter[str] = Counter()
        kept: list[Row] = []
        refused: list[Row] = []
        for start in range(0, len(rows), size):
            group = rows[start : start + size]
            if group[0].prompt_id in absent:
                kept += group
                continue
            found = [reason for row in group if (reason := self._reason(row))]
            reasons.update(found)
            if found:
                refused.append(group[0])
                group = [replace(row, response_mask=(False,) * len(row.response_mask)) for row in group]
            kept += group
        told = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "none refused"
        if len(refused) == len(prompts):
            raise DataError(
                f"FilteredCurator refused the responses to all {len(prompts)} prompts of round {prompts.round} "
                f"({told}): look at what was written, then raise max_new_tokens or change its filters."
            )
        told += f"; {len(absent)} prompts are of other processes" if absent else ""
        first = f"; the first left out is {refused[0].prompt_id}" if refused else ""
        _log.info(
            "FilteredCurator, round %d: %d of %d prompts left out; of %d rows %s%s",
            prompts.round, len(refused), len(prompts), len(rows), told, first,
        )  # fmt: skip
        return kept

    def _reason(self, row: Row) -> str | None:
        """Why a row is refused; None if it is not."""
        return next((own.reason for own in self.filters if own.refuses(row)), None)
