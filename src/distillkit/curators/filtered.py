"""Filtering of responses before they are trained on."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from distillkit.curators.base import WrappedCurator
from distillkit.curators.filters import Empty, Repeated, Truncated
from distillkit.errors import ConfigError, DataError
from distillkit.interfaces import Curator, Generator, ResponseFilter
from distillkit.types import Prompts, Row

_log = logging.getLogger(__name__)


class FilteredCurator(WrappedCurator):
    """The rows of another curator, with responses that a filter refuses excluded from training.

    A prompt with several rows is left out entirely if one of them is refused; the order of the prompts in the round
    does not change. The log says how many rows each filter refused; a row counts for the first filter that refuses it.
    Responses that are still pending on other processes are not filtered.

    Args:
        curator: The wrapped curator.
        filters: Filters that refuse responses; None is `Empty`, `Truncated` and `Repeated`.

    Raises:
        ConfigError: If `filters` is an empty list.
    """

    def __init__(self, curator: Curator, filters: list[ResponseFilter] | None = None) -> None:
        super().__init__(curator)
        if filters is not None and not filters:
            raise ConfigError(
                "FilteredCurator.filters is empty: list at least one filter, or use the wrapped curator directly."
            )
        self.filters: list[ResponseFilter] = [Empty(), Truncated(), Repeated()] if filters is None else filters

    def curate(self, prompts: Prompts, generators: Mapping[str, Generator]) -> Sequence[Row]:
        """The wrapped curator's rows; the mask of each row of a refused prompt is False everywhere.

        Raises:
            DataError: If every prompt of the round is refused.
        """
        rows = self.curator.curate(prompts, generators)
        size = len(rows) // len(prompts)
        num_pending = 0
        reasons: Counter[str] = Counter()
        filtered: list[Row] = []
        refused: list[Row] = []
        for start in range(0, len(rows), size):
            group = rows[start : start + size]
            if any(row.pending for row in group):
                num_pending += 1
                filtered += group
                continue
            group_reasons = [reason for row in group if (reason := self._reason(row))]
            reasons.update(group_reasons)
            if group_reasons:
                refused.append(group[0])
                group = [replace(row, response_mask=(False,) * len(row.response_mask)) for row in group]
            filtered += group
        summary = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "none refused"
        if len(refused) == len(prompts):
            raise DataError(
                f"FilteredCurator refused the responses to all {len(prompts)} prompts of round {prompts.round} "
                f"({summary}): look at the responses, then raise max_new_tokens or change its filters."
            )
        summary += f"; {num_pending} prompts are pending on other processes" if num_pending else ""
        first = f"; the first left out is {_named(prompts, refused[0])}" if refused else ""
        _log.info(
            "FilteredCurator, round %d: %d of %d prompts left out; of %d rows %s%s",
            prompts.round,
            len(refused),
            len(prompts),
            len(rows),
            summary,
            first,
        )
        return filtered

    def _reason(self, row: Row) -> str | None:
        """The reason why a row is refused; None if it is not."""
        return next((part.reason for part in self.filters if part.refuses(row)), None)


def _named(prompts: Prompts, row: Row) -> str:
    """The prompt of a row for messages: its origin, or its id where none is known, and how it begins."""
    prompt = next(prompt for prompt in prompts if prompt.id == row.prompt_id)
    return f"{prompt.origin or prompt.id} {prompt.excerpt}".rstrip()
