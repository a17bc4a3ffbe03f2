"""Replay buffer: rows of earlier rounds in place of fresh ones."""

import logging
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from distillkit.curators.base import WrappedCurator
from distillkit.curators.shares import RoundShare, uniform_draw
from distillkit.devices.seeds import resolve_seed
from distillkit.errors import ConfigError, check_range
from distillkit.interfaces import Curator, Generator, Schedule
from distillkit.types import Progress, Prompts, Row, Summary

_log = logging.getLogger(__name__)

Group = tuple[Row, ...]
"""The rows of one prompt."""


class ReplayCurator(WrappedCurator):
    """Replaces a share of the prompts by rows from a buffer of earlier rounds; the rest get fresh responses.

    Fresh rows enter the buffer when their round is over, and the oldest rows leave it. Until it is full, all prompts
    get fresh responses. Rows that are not trained on don't enter it. The buffer is part of the checkpoint.

    Ko et al. 2024 (DistiLLM), arXiv 2402.03898, section 3.2.

    Args:
        curator: Curator of the fresh rows; its rounds must not be `once`.
        replay: Probability in [0, 1] that a prompt is replaced by rows of the buffer; a schedule is read when a round
            starts.
        capacity: Size of the buffer in prompts, each with all its rows; at least 1.
        seed: Seed of the random choice of prompts and rows; None is the seed of the run (`seed_everything`).

    Raises:
        ConfigError: If a number is outside its range, or the curator's rounds are `once`.
    """

    def __init__(
        self, curator: Curator, replay: float | Schedule = 0.5, capacity: int = 1000, seed: int | None = None
    ) -> None:
        super().__init__(curator)
        check_range("ReplayCurator.capacity", capacity, 1)
        if curator.rounds == "once":
            raise ConfigError(
                f"ReplayCurator.curator must generate new responses during training, and {type(curator).__name__} has "
                "rounds `once`: change its rounds, or leave the buffer out."
            )
        self.replay, self.capacity = RoundShare("ReplayCurator.replay", replay), capacity
        self.seed = resolve_seed(seed)
        self._start: list[Group] = []  # the buffer when the first round of `_fresh` began
        self._fresh: dict[int, list[Group]] = {}  # the rows that the last two rounds add: both may be curated again

    def update(self, progress: Progress, metrics: Mapping[str, Summary]) -> None:
        """Updates the schedule and the wrapped curator."""
        self.replay.update(progress, metrics)
        super().update(progress, metrics)

    def schedules(self) -> Mapping[str, Schedule]:
        """The schedule of the replayed share, if it has one, and those of the wrapped curator."""
        return {**super().schedules(), **self.replay.schedules()}

    def on_round_start(self, round_index: int) -> None:
        """Reads the schedule, and lets the wrapped curator read its own."""
        self.replay.at(round_index)
        super().on_round_start(round_index)

    def curate(self, prompts: Prompts, generators: Mapping[str, Generator]) -> Sequence[Row]:
        """The rows for each prompt: fresh ones, or rows of the buffer."""
        buffer, share = self._buffer(prompts.round), self.replay.at(prompts.round)
        share = share if len(buffer) == self.capacity else 0.0
        # Independent of the draw by which a MixedCurator with the same seed selected these prompts.
        replayed = [uniform_draw(self.seed, prompts.round, f"replay/{prompt.id}") < share for prompt in prompts]
        remaining = Prompts(tuple(p for p, old in zip(prompts, replayed, strict=True) if not old), prompts.round)
        rows = self.curator.curate(remaining, generators) if remaining else []
        size = len(rows) // len(remaining) if remaining else 0
        fresh = [tuple(rows[start : start + size]) for start in range(0, len(rows), size or 1)]
        trained = [group for group in fresh if any(any(row.response_mask) for row in group)]
        self._fresh[prompts.round] = trained[-self.capacity :]
        order, new = self._order(prompts.round, len(buffer)), iter(fresh)
        groups = [buffer[order[index % len(order)]] if index >= 0 else next(new) for index in _replay_indices(replayed)]
        _log.info(
            "ReplayCurator, round %d: %d of %d prompts replayed from the buffer (%.1f %%, share %.1f %%), which was "
            "filled with the rows of %d of %d prompts",
            prompts.round,
            sum(replayed),
            len(prompts),
            100 * sum(replayed) / len(prompts),
            100 * share,
            len(buffer),
            self.capacity,
        )
        return [row for group in groups for row in group]

    def _buffer(self, round_index: int) -> list[Group]:
        """The buffer at the start of a round."""
        if round_index not in self._fresh:
            self._fresh[round_index] = []
            if len(self._fresh) > 2:
                oldest = self._fresh.pop(min(self._fresh))
                self._start = (self._start + oldest)[-self.capacity :]
        before = [group for earlier in sorted(self._fresh) if earlier < round_index for group in self._fresh[earlier]]
        return (self._start + before)[-self.capacity :]

    def _order(self, round_index: int, count: int) -> list[int]:
        """The order in which a round takes groups from the buffer: each at most once while there are enough."""
        seed = int(uniform_draw(self.seed, round_index, "buffer") * 2**53)
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()

    def get_extra_state(self) -> dict[str, Any]:
        """The buffer before the last two rounds, and the groups that each of them adds."""
        fresh = [[round_index, _packed(groups)] for round_index, groups in self._fresh.items()]
        return {"start": _packed(self._start), "fresh": fresh}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restores the saved buffer."""
        self._start = _unpacked(state["start"])
        self._fresh = {int(round_index): _unpacked(groups) for round_index, groups in state["fresh"]}


def _replay_indices(replayed: Sequence[bool]) -> list[int]:
    """For each prompt the number of replayed prompts before it, or −1 if it gets a fresh response."""
    indices, count = [], 0
    for old in replayed:
        indices.append(count if old else -1)
        count += old
    return indices


def _packed(groups: Sequence[Group]) -> dict[str, Any]:
    """Groups of rows as tensors and lists, which a checkpoint can load without running code."""
    rows = [row for group in groups for row in group]
    ids, mask = array("q"), bytearray()
    for row in rows:
        ids.extend(row.input_ids)
        mask.extend(row.response_mask)
    return {
        "sizes": [len(group) for group in groups],
        "lengths": [len(row.input_ids) for row in rows],
        "input_ids": torch.tensor(ids, dtype=torch.int32),
        "response_mask": torch.tensor(mask, dtype=torch.bool),
        "facts": [[row.writer, row.prompt_id, row.ended, row.blank] for row in rows],
    }


def _unpacked(state: dict[str, Any]) -> list[Group]:
    ids, masks = (state[name].split(state["lengths"]) for name in ("input_ids", "response_mask"))
    rows = iter(
        Row(tuple(row_ids.tolist()), tuple(mask.tolist()), *facts)
        for row_ids, mask, facts in zip(ids, masks, state["facts"], strict=True)
    )
    return [tuple(next(rows) for _ in range(size)) for size in state["sizes"]]
