"""A mixture of curators, each for a share of the prompts."""

import logging
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

from torch import nn

from distillkit.curators.base import merged_generators
from distillkit.curators.shares import RoundShare, uniform_draw
from distillkit.devices.seeds import resolve_seed
from distillkit.errors import ConfigError
from distillkit.interfaces import Curator, Generator, Schedule
from distillkit.types import Progress, Prompts, Row, Summary

_log = logging.getLogger(__name__)


class MixedCurator(Curator):
    """Several curators, each of which answers a share of the prompts.

    The curator of each prompt is sampled anew in each round, from the seed, the round and the prompt's id. With two
    parts, the student's share is λ of Agarwal et al. 2023 (GKD), arXiv 2306.13649, algorithm 1, which samples once per
    batch instead of once per prompt.

    Args:
        parts: The curators, at least two.
        shares: Share of each part, in the same order; they sum to 1. With two parts, it may be a schedule for the share
            of the first, read when a round starts.
        seed: Seed of the random choice of curators; None is the seed of the run (`seed_everything`).

    Raises:
        ConfigError: If there are fewer than two parts, the shares don't match them, or parts regenerate during training
            at different intervals.
    """

    def __init__(self, parts: list[Curator], shares: list[float] | Schedule, seed: int | None = None) -> None:
        super().__init__()
        if len(parts) < 2:
            raise ConfigError(f"MixedCurator.parts needs at least two curators, got {len(parts)}.")
        self.parts, self.seed = nn.ModuleList(parts), resolve_seed(seed)
        self.shares, self.first = _checked(shares, len(parts))
        self.needs_reference = any(part.needs_reference for part in parts)
        moving = {part.rounds for part in parts} - {"once"}
        if len(moving) > 1:
            lengths = ", ".join(str(part.rounds) for part in parts)
            raise ConfigError(f"MixedCurator.parts must have the same rounds unless they are `once`, got {lengths}.")
        default = "once" if self.first is None else "epoch"
        self._rounds: str | int = moving.pop() if moving else default
        self._sizes: dict[int, int] = {}  # rows per prompt of each part that has curated

    @property
    def rounds(self) -> str | int:
        """The rounds of the parts that regenerate; if none does, `epoch` with a schedule and `once` without."""
        return self._rounds

    @property
    def writers(self) -> frozenset[str]:
        """The writers of all parts."""
        return frozenset().union(*(part.writers for part in self._parts()))

    def own_generators(self) -> Mapping[str, Generator]:
        """The own generators of all parts."""
        return merged_generators(*self._parts())

    def update(self, progress: Progress, metrics: Mapping[str, Summary]) -> None:
        """Updates the schedule and the parts."""
        if self.first is not None:
            self.first.update(progress, metrics)
        for part in self._parts():
            part.update(progress, metrics)

    def schedules(self) -> Mapping[str, Schedule]:
        """The schedule of the shares, if there is one, and those of the parts, prefixed with index and name."""
        schedules: dict[str, Schedule] = {} if self.first is None else self.first.schedules()
        for index, part in enumerate(self._parts()):
            prefix = f"{index}_{type(part).__name__}/"
            schedules |= {f"{prefix}{name}": schedule for name, schedule in part.schedules().items()}
        return schedules

    def on_round_start(self, round_index: int) -> None:
        """Reads the schedule, and lets the parts read theirs."""
        self._shares_at(round_index)
        for part in self._parts():
            part.on_round_start(round_index)

    def prepare(self, prompts: Prompts, generators: Mapping[str, Generator]) -> None:
        """Prepares each part: for its fixed prompts with rounds `once`, else for all prompts, since any may follow."""
        once = self._rounds == "once"
        indices = self._assign(prompts.at_round(0)) if once else [range(len(prompts)) for _ in self._parts()]
        for part, part_indices in zip(self._parts(), indices, strict=True):
            if part_indices:
                part.prepare(_selected(prompts, part_indices), generators)

    def curate(self, prompts: Prompts, generators: Mapping[str, Generator]) -> Sequence[Row]:
        """The rows of the part that answers each prompt, in the prompts' order.

        Raises:
            ConfigError: If parts give different numbers of rows per prompt.
        """
        prompts = prompts.at_round(0) if self._rounds == "once" else prompts
        indices = self._assign(prompts)
        groups: dict[int, Sequence[Row]] = {}
        for part_index, (part, part_indices) in enumerate(zip(self._parts(), indices, strict=True)):
            if part_indices:
                rows = part.curate(_selected(prompts, part_indices), generators)
                size = self._size(part_index, len(rows), len(part_indices))
                groups |= {index: rows[i * size : (i + 1) * size] for i, index in enumerate(part_indices)}
        self._report(prompts.round, indices)
        return [row for index in range(len(prompts)) for row in groups[index]]

    def _assign(self, prompts: Prompts) -> list[list[int]]:
        """The indices of each part's prompts."""
        limits = list(accumulate(self._shares_at(prompts.round)))
        indices: list[list[int]] = [[] for _ in limits]
        last = max(part for part, share in enumerate(self._shares_at(prompts.round)) if share > 0)
        for index, prompt in enumerate(prompts):
            draw = uniform_draw(self.seed, prompts.round, prompt.id)
            # The last limit is 1 up to rounding, and a part without a share gets nothing.
            indices[next((part for part, limit in enumerate(limits) if draw < limit), last)].append(index)
        return indices

    def _shares_at(self, round_index: int) -> tuple[float, ...]:
        if self.first is None:
            return self.shares
        share = self.first.at(round_index)
        return share, 1.0 - share

    def _size(self, part_index: int, num_rows: int, num_prompts: int) -> int:
        """Rows per prompt of a part. All parts must have the same number."""
        size, rest = divmod(num_rows, num_prompts)
        assert rest == 0, "a curator gives every prompt the same number of rows"
        self._sizes[part_index] = size
        if len(set(self._sizes.values())) > 1:
            sizes = ", ".join(f"{count} of {type(self.parts[part]).__name__}" for part, count in self._sizes.items())
            raise ConfigError(f"MixedCurator.parts must give the same number of rows per prompt, got {sizes}.")
        return size

    def _report(self, round_index: int, indices: Sequence[Sequence[int]]) -> None:
        total = sum(map(len, indices))
        shares, counts = self._shares_at(round_index), map(len, indices)
        summaries = [
            f"{' and '.join(sorted(part.writers)) or 'dataset'} {count} ({count / total:.1%}, share {share:.1%})"
            for part, count, share in zip(self._parts(), counts, shares, strict=True)
        ]
        _log.info("MixedCurator, round %d, %d prompts: %s", round_index, total, ", ".join(summaries))

    def _parts(self) -> tuple[Curator, ...]:
        return tuple(self.parts)  # type: ignore[arg-type]


def _checked(shares: list[float] | Schedule, num_parts: int) -> tuple[tuple[float, ...], RoundShare | None]:
    """The fixed shares; or an empty tuple and the scheduled share of the first of two parts."""
    if isinstance(shares, Schedule):
        if num_parts != 2:
            raise ConfigError(
                f"MixedCurator.shares may be a schedule, the share of the first part, only with two parts, got "
                f"{num_parts}: give a number for each."
            )
        return (), RoundShare("MixedCurator.shares", shares)
    if len(shares) != num_parts:
        raise ConfigError(f"MixedCurator.shares needs one number for each of {num_parts} parts, got {shares}.")
    if min(shares) < 0 or not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
        raise ConfigError(f"MixedCurator.shares must be at least 0 and sum to 1, got {shares}.")
    return tuple(shares), None


def _selected(prompts: Prompts, indices: Sequence[int]) -> Prompts:
    return Prompts(tuple(prompts[index] for index in indices), prompts.round)
