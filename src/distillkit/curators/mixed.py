"""Several curators, each for a share of the prompts."""

import logging
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

from torch import nn

from distillkit.curators.brought import merged_generators
from distillkit.curators.shares import RoundShare, drawn
from distillkit.errors import ConfigError
from distillkit.interfaces import Curator, Generator, Schedule
from distillkit.types import Progress, Prompts, Row, Summary

_log = logging.getLogger(__name__)


class MixedCurator(Curator):
    """Several curators, each of which answers a share of the prompts.

    Which of them answers a prompt is drawn anew in each round, from the seed, the round and the prompt's id. With two
    parts, the student's share is λ of Agarwal et al. 2023 (GKD), arXiv 2306.13649, algorithm 1, which draws once for a
    batch and not for each prompt.

    Args:
        parts: The curators, at least two.
        shares: The share of each of them, in the same order; they sum to 1. Of two parts, a schedule of the first
            one's, read when a round starts.
        seed: Seed of the draws.

    Raises:
        ConfigError: If there are fewer than two parts, the shares don't fit them, or parts write anew during training
            and at different times.
    """

    def __init__(self, parts: list[Curator], shares: list[float] | Schedule, seed: int = 0) -> None:
        super().__init__()
        if len(parts) < 2:
            raise ConfigError(f"MixedCurator.parts needs at least two curators, got {len(parts)}.")
        self.parts, self.seed = nn.ModuleList(parts), seed
        self.shares, self.first = _checked(shares, len(parts))
        self.needs_reference = any(part.needs_reference for part in parts)
        moving = {part.rounds for part in parts} - {"once"}
        if len(moving) > 1:
            found = ", ".join(str(part.rounds) for part in parts)
            raise ConfigError(f"MixedCurator.parts must have the same rounds unless they are `once`, got {found}.")
        still = "once" if self.first is None else "epoch"
        self._rounds: str | int = moving.pop() if moving else still
        self._sizes: dict[int, int] = {}  # rows per prompt of each part that has been asked

    @property
    def rounds(self) -> str | int:
        """Those of the parts that write anew; if none does, `epoch` with a schedule, which moves, and else `once`."""
        return self._rounds

    @property
    def writers(self) -> frozenset[str]:
        """Those of all parts."""
        return frozenset().union(*(part.writers for part in self._parts()))

    def brings(self) -> Mapping[str, Generator]:
        """Those of all parts."""
        return merged_generators(*self._parts())

    def update(self, progress: Progress, metrics: Mapping[str, Summary]) -> None:
        """Moves the schedule and the parts."""
        if self.first is not None:
            self.first.update(progress, metrics)
        for part in self._parts():
            part.update(progress, metrics)

    def begin(self, round_number: int) -> None:
        """Reads the schedule, and has the parts read theirs."""
        self._shares_at(round_number)
        for part in self._parts():
            part.begin(round_number)

    def prepare(self, prompts: Prompts, generators: Mapping[str, Generator]) -> None:
        """Prepares each part: for its own prompts if they stay its own, else for all, which it may get."""
        once = self._rounds == "once"
        places = self._divided(prompts.at_round(0)) if once else [range(len(prompts)) for _ in self._parts()]
        for part, own in zip(self._parts(), places, strict=True):
            if own:
                part.prepare(_selected(prompts, own), generators)

    def curate(self, prompts: Prompts, generators: Mapping[str, Generator]) -> Sequence[Row]:
        """The rows of whichever part answers a prompt, in the prompts' order.

        Raises:
            ConfigError: If parts give different numbers of rows per prompt.
        """
        asked = prompts.at_round(0) if self._rounds == "once" else prompts
        places = self._divided(asked)
        groups: dict[int, Sequence[Row]] = {}
        for number, (part, own) in enumerate(zip(self._parts(), places, strict=True)):
            if own:
                rows = part.curate(_selected(asked, own), generators)
                size = self._size(number, len(rows), len(own))
                groups |= {place: rows[at * size : (at + 1) * size] for at, place in enumerate(own)}
        self._report(asked.round, places)
        return [row for place in range(len(prompts)) for row in groups[place]]

    def _divided(self, prompts: Prompts) -> list[list[int]]:
        """The places of each part's prompts."""
        limits = list(accumulate(self._shares_at(prompts.round)))
        places: list[list[int]] = [[] for _ in limits]
        last = max(number for number, share in enumerate(self._shares_at(prompts.round)) if share > 0)
        for place, prompt in enumerate(prompts):
            number = drawn(self.seed, prompts.round, prompt.id)
            # The last limit is 1 up to rounding, and a part without a share gets nothing.
            places[next((part for part, limit in enumerate(limits) if number < limit), last)].append(place)
        return places

    def _shares_at(self, round_number: int) -> tuple[float, ...]:
        if self.first is None:
            return self.shares
        share = self.first.at(round_number)
        return share, 1.0 - share

    def _size(self, number: int, num_rows: int, num_prompts: int) -> int:
        """Rows per prompt of a part; all parts must have the same."""
        size, rest = divmod(num_rows, num_prompts)
        assert rest == 0, "a curator gives every prompt the same number of rows"
        self._sizes[number] = size
        if len(set(self._sizes.values())) > 1:
            found = ", ".join(f"{own} of {type(self.parts[part]).__name__}" for part, own in self._sizes.items())
            raise ConfigError(f"MixedCurator.parts must give the same number of rows per prompt, got {found}.")
        return size

    def _report(self, round_number: int, places: Sequence[Sequence[int]]) -> None:
        total = sum(map(len, places))
        shares = self._shares_at(round_number)
        told = [
            f"{' and '.join(sorted(part.writers)) or 'dataset'} {len(own)} ({len(own) / total:.1%}, share {share:.1%})"
            for part, own, share in zip(self._parts(), places, shares, strict=True)
        ]
        _log.info("MixedCurator, round %d, %d prompts: %s", round_number, total, ", ".join(told))

    def _parts(self) -> tuple[Curator, ...]:
        return tuple(self.parts)  # type: ignore[arg-type]


def _checked(shares: list[float] | Schedule, num_parts: int) -> tuple[tuple[float, ...], RoundShare | None]:
    """The fixed shares, or none of them and the share of the first of two parts."""
    if isinstance(shares, Schedule):
        if num_parts != 2:
            raise ConfigError(
                f"MixedCurator.shares may be a schedule, the first part's share, where there are two parts, got "
                f"{num_parts}: give a number for each."
            )
        return (), RoundShare("MixedCurator.shares", shares)
    if len(shares) != num_parts:
        raise ConfigError(f"MixedCurator.shares needs one number for each of {num_parts} parts, got {shares}.")
    if min(shares) < 0 or not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
        raise ConfigError(f"MixedCurator.shares must be at least 0 and sum to 1, got {shares}.")
    return tuple(shares), None


def _selected(prompts: Prompts, places: Sequence[int]) -> Prompts:
    return Prompts(tuple(prompts[place] for place in places), prompts.round)
