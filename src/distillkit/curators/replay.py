"""Rows of earlier rounds in the place of fresh ones."""

import logging
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from distillkit.curators.shares import RoundShare, drawn
from distillkit.curators.wrapped import WrappedCurator
from distillkit.errors import ConfigError
from distillkit.interfaces import Curator, Generator, Schedule
from distillkit.types import Progress, Prompts, Row, Summary

_log = logging.getLogger(__name__)

Group = tuple[Row, ...]
"""The rows of one prompt."""


class ReplayCurator(WrappedCurator):
    """Rows from a buffer of earlier ones in the place of a share of the prompts, and fresh ones for the others.

    Fresh rows enter the buffer when their round is over, and the oldest leave it. All prompts are answered afresh as
    long as it isn't full. Rows that are not trained on don't enter it. The buffer is part of the checkpoint.

    Ko et al. 2024 (DistiLLM), arXiv 2402.03898, section 3.2.

    Args:
        curator: Writes the fresh rows; its rounds must not be `once`.
        replay: Probability in [0, 1] with which a prompt's place is taken by rows of the buffer; a schedule is read
            when a round starts.
        capacity: Prompts whose rows the buffer holds, at least 1.
        seed: Seed of the draws.

    Raises:
        ConfigError: If a number is outside its range, or the curator's rounds are `once`.
    """

    def __init__(self, curator: Curator, replay: float | Schedule = 0.5, capacity: int = 1000, seed: int = 0) -> None:
        super().__init__(curator)
        if capacity < 1:
            raise ConfigError(f"ReplayCurator.capacity must be at least 1, got {capacity}.")
        if curator.rounds == "once":
            raise ConfigError(
                f"ReplayCurator.curator must write anew during training, and {type(curator).__name__} has rounds "
                "`once`: give it other rounds, or leave the buffer out."
            )
        self.replay, self.capacity, self.seed = RoundShare("ReplayCurator.replay", replay), capacity, seed
        self._start: list[Group] = []  # the buffer when the first round of `_fresh` began
        self._fresh: dict[int, list[Group]] = {}  # what the last two rounds add to it: both may be asked for again

    def update(self, progress: Progress, metrics: Mapping[str, Summary]) -> None:
        """Moves the schedule and the other curator."""
        self.replay.update(progress, metrics)
        super().update(progress, metrics)

    def begin(self, round_number: int) -> None:
        """Reads the schedule, and has the other curator read its own."""
        self.replay.at(round_number)
        super().begin(round_number)

    def curate(self, prompts: Prompts, generators: Mapping[str, Generator]) -> Sequence[Row]:
        """The rows for each prompt, fresh ones or others in their place."""
        buffer, share = self._buffer(prompts.round), self.replay.at(prompts.round)
        share = share if len(buffer) == self.capacity else 0.0
        # Not the draw by which a MixedCurator of the same seed has chosen these prompts.
        replayed = [drawn(self.seed, prompts.round, f"replay/{prompt.id}") < share for prompt in prompts]
        asked = Prompts(tuple(p for p, old in zip(prompts, replayed, strict=True) if not old), prompts.round)
        rows = self.curator.curate(asked, generators) if asked else []
        size = len(rows) // len(asked) if asked else 0
        fresh = [tuple(rows[start : start + size]) for start in range(0, len(rows), size or 1)]
        trained = [group for group in fresh if any(any(row.response_mask) for row in group)]
        self._fresh[prompts.round] = trained[-self.capacity :]
        old, new = self._order(prompts.round, len(buffer)), iter(fresh)
        groups = [buffer[old[at % len(old)]] if at >= 0 else next(new) for at in _places(replayed)]
        _log.info(
            "ReplayCurator, round %d: rows of the buffer for %d of %d prompts (%.1f %%, share %.1f %%); it held the "
            "rows of %d prompts of %d",
            prompts.round, sum(replayed), len(prompts), 100 * sum(replayed) / len(prompts), 100 * share,
            len(buffer), self.capacity,
        )  # fmt: skip
        return [row for group in groups for row in group]

    def _buffer(self, round_number: int) -> list[Group]:
        """The buffer when a round began."""
        if round_number not in self._fresh:
            self._fresh[round_number] = []
            if len(self._fresh) > 2:
                oldest = self._fresh.pop(min(self._fresh))
                self._start = (self._start + oldest)[-self.capacity :]
        before = [group for number in sorted(self._fresh) if number < round_number for group in self._fresh[number]]
        return (self._start + before)[-self.capacity :]

    def _order(self, round_number: int, count: int) -> list[int]:
        """The order in which a round takes groups from the buffer: each at most once while there are enough."""
        seed = int(drawn(self.seed, round_number, "buffer") * 2**53)
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()

    def get_extra_state(self) -> dict[str, Any]:
        """The buffer before the last two rounds, and what each of them adds to it."""
        fresh = [[number, _packed(groups)] for number, groups in self._fresh.items()]
        return {"start": _packed(self._start), "fresh": fresh}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes up what was saved."""
        self._start = _unpacked(state["start"])
        self._fresh = {int(number): _unpacked(groups) for number, groups in state["fresh"]}


def _places(replayed: Sequence[bool]) -> list[int]:
    """For each prompt how many are replayed before it, or −1 if it is answered afresh."""
    found, count = [], 0
    for old in replayed:
        found.append(count if old else -1)
        count += old
    return found


def _packed(groups: Sequence[Group]) -> dict[str, Any]:
    """Groups of rows as a few tensors and lists, which a checkpoint holds and loads without running code."""
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
        Row(tuple(own.tolist()), tuple(mask.tolist()), *facts)
        for own, mask, facts in zip(ids, masks, state["facts"], strict=True)
    )
    return [tuple(next(rows) for _ in range(size)) for size in state["sizes"]]
