"""Data loader whose batches are made from responses that are generated one round at a time."""

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from distillkit.data.collate import Layout, collate
from distillkit.rollouts.rounds import RoundRunner
from distillkit.types import Batch, Prompts, Row

Steps = list[list[list[int]]]
"""An epoch: for each optimizer step, for each of its global micro-batches, the indices of the prompts."""


_SEED_STRIDE = 1_000_003
"""Distance of two seeds in torch's: runs with neighbouring seeds share no order in any epoch."""

_EPOCHS = 100
"""Epochs within which it is looked for which prompts a run trains on; a longer run is taken to train on all."""


@dataclass(frozen=True)
class Batching:
    """Settings that determine how rows become micro-batches.

    Args:
        batch_size: Prompts in a micro-batch of one rank; a prompt may have several rows.
        pad_id: Token id that pads a row.
        accumulate: Micro-batches per optimizer step.
        shuffle: Whether the prompts are shuffled.
        repeat: Whether every epoch has the order of the first one, instead of a new one.
        seed: Seed of the order.
        layout: Layout of the rows, see `collate`.
        bucket: The length of packed rows is a multiple of this.
    """

    batch_size: int
    pad_id: int
    accumulate: int = 1
    shuffle: bool = True
    repeat: bool = False
    seed: int = 0
    layout: Layout = "shared"
    bucket: int = 1


class Loop(Protocol):
    """The loop that trains on the batches. The loader reads its position when an iteration starts."""

    @property
    def epoch(self) -> int:
        """Index of the current epoch."""

    @property
    def batches_done(self) -> int:
        """Micro-batches of this epoch that are trained on already, a whole number of optimizer steps."""

    @property
    def max_batches(self) -> float:
        """Number of micro-batches in an epoch, if there are as many."""

    def will_run(self, epoch: int, step: int) -> bool:
        """True if the run will reach this optimizer step of this epoch: responses are generated for such steps only."""


@dataclass
class FixedLoop:
    """A loop at a fixed position.

    Args:
        epoch: Index of the epoch.
        batches_done: Micro-batches of this epoch that are trained on already.
        max_batches: Number of micro-batches in an epoch, if there are as many.
    """

    epoch: int = 0
    batches_done: int = 0
    max_batches: float = math.inf

    def will_run(self, epoch: int, step: int) -> bool:
        """True: there is no end."""
        return True


class RoundLoader:
    """An epoch's micro-batches for one rank: a sized iterable, as Lightning accepts for a data loader.

    The order of the prompts depends only on the seed and the epoch. At the start of each round its prompts are curated,
    of the last round those that the run still trains on.
    The first micro-batch of each optimizer step carries all micro-batches of the step, so that units can be counted
    before the first gradient is computed. Lightning counts the batches that were trained on, and it alone: the loader
    has no count of its own that could differ.

    Args:
        prompts: All prompts of the run.
        rounds: Provides the rows of each round's prompts; every rank requests the prompts of all ranks.
        batching: Settings of the micro-batches.
        loop: Position of training; None iterates over the whole of epoch 0.
        rank: Index of this process.
        world: Number of processes.
    """

    def __init__(
        self,
        prompts: Prompts,
        rounds: RoundRunner,
        batching: Batching,
        loop: Loop | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.prompts, self.rounds, self.batching = prompts, rounds, batching
        self.loop, self.rank, self.world = loop or FixedLoop(), rank, world
        self._prepared = False

    def __len__(self) -> int:
        return -(-len(self.prompts) // (self.batching.batch_size * self.world))

    def state_dict(self) -> dict[str, int]:
        """Nothing: Lightning's count of batches is the state. Without this method it warns that we can't resume."""
        return {}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Does nothing: see `state_dict`."""

    def __iter__(self) -> Iterator[Batch]:
        epoch, done = self.loop.epoch, self.loop.batches_done
        steps = self._steps(epoch)
        length = self._length(steps)
        rows: dict[int, list[Row]] = {}
        if not self._prepared:
            self.rounds.prepare(self._prompts_of_run(epoch))
            self._prepared = True
        for step in range(done // self.batching.accumulate, len(steps)):
            if step % length == 0 or not rows.keys() >= set(_prompt_indices(steps[step : step + 1])):
                first = step // length * length
                rows = self._round(epoch, steps, first, length, step)
            window = tuple(self._batch(batch, rows) for batch in steps[step])
            yield replace(window[0], window=window)
            yield from window[1:]

    def _steps(self, epoch: int) -> Steps:
        """The prompts of each optimizer step of an epoch."""
        order = list(range(len(self.prompts)))
        if self.batching.shuffle:
            seed = self.batching.seed * _SEED_STRIDE + (0 if self.batching.repeat else epoch)
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(order), generator=generator).tolist()
        size = self.batching.batch_size * self.world
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        batches = batches[: int(min(self.loop.max_batches, len(batches)))]
        accumulate = self.batching.accumulate
        return [batches[start : start + accumulate] for start in range(0, len(batches), accumulate)]

    def _length(self, steps: Steps) -> int:
        """Optimizer steps per round."""
        return self.rounds.length if isinstance(self.rounds.length, int) else len(steps)

    def first_round(self) -> Prompts:
        """The prompts of round 0, the first that an iteration curates."""
        steps = self._steps(0)
        return self._round_prompts(0, steps, 0, self._length(steps))

    def _prompts_of_run(self, epoch: int) -> Prompts:
        """The prompts that the run trains on from an epoch on, in the order of the data."""
        used: set[int] = set()
        for later in range(epoch, epoch + _EPOCHS):
            steps = self._steps(later)
            used.update(_prompt_indices(steps[: self._end(later, steps)]))
            if len(used) == len(self.prompts):
                break
            if not self.loop.will_run(later + 1, 0):
                return Prompts(tuple(self.prompts[index] for index in sorted(used)), self.prompts.round)
        return self.prompts

    def _end(self, epoch: int, steps: Steps, reached: int = 0) -> int:
        """Number of steps of an epoch that the run takes; all if it has no such end after the step `reached`."""
        end = bisect_left(range(len(steps)), True, key=lambda step: not self.loop.will_run(epoch, step))
        return end if end > reached else len(steps)

    def _round(self, epoch: int, steps: Steps, first: int, length: int, reached: int) -> dict[int, list[Row]]:
        """The rows of the round that starts with step `first` and goes on at `reached`, by prompt index.

        Prefetches the next round.
        """
        prompts = self._round_prompts(epoch, steps, first, length, reached)
        indices = _prompt_indices(steps[first : first + length])[: len(prompts)]
        rows = self.rounds.rows(prompts)
        if self.rounds.prefetch_device is not None:
            next_epoch, next_first = (epoch, first + length) if first + length < len(steps) else (epoch + 1, 0)
            if self.loop.will_run(next_epoch, next_first):
                next_steps = steps if next_epoch == epoch else self._steps(epoch + 1)
                self.rounds.prefetch(self._round_prompts(next_epoch, next_steps, next_first, length))
        size = len(rows) // len(indices)
        assert size > 0, "a curator gives every prompt a row"
        assert len(rows) == size * len(indices), "a curator gives every prompt the same number of rows"
        return {
            prompt_index: list(rows[position * size : (position + 1) * size])
            for position, prompt_index in enumerate(indices)
        }

    def _round_prompts(self, epoch: int, steps: Steps, first: int, length: int, reached: int = 0) -> Prompts:
        """The prompts that the run trains on in the round that starts with step `first` and goes on at `reached`."""
        end = self._end(epoch, steps, max(first, reached))
        indices = _prompt_indices(steps[first : min(first + length, end)])
        round_index = epoch * -(-len(steps) // length) + first // length
        return Prompts(tuple(self.prompts[index] for index in indices), round_index)

    def _batch(self, prompt_indices: Sequence[int], rows: Mapping[int, list[Row]]) -> Batch:
        groups = [rows[index] for index in prompt_indices]
        # A group without tokens to train on would only add padding; if all are such, the first stands in for the batch.
        trained = [group for group in groups if any(any(row.response_mask) for row in group)] or groups[:1]
        local_rows = rank_rows(trained, self.rank, self.world)
        size = len(groups[0])
        pair = [index // size for index in range(len(local_rows))]  # by index: two groups may share a prompt (replay)
        return collate(local_rows, self.batching.pad_id, self.batching.layout, self.batching.bucket, pair)


def _prompt_indices(steps: Steps) -> list[int]:
    """Indices of all prompts of some optimizer steps, in order."""
    return [index for step in steps for batch in step for index in batch]


class FixedLoader:
    """The same batches in each epoch. Lightning would take a plain list for a list of loaders.

    Args:
        batches: The batches.
        length: Number of batches without the trainer's limit, which Lightning applies to it; None is that of `batches`.
    """

    def __init__(self, batches: Sequence[Batch], length: int | None = None) -> None:
        self.batches, self.length = batches, len(batches) if length is None else length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def rank_rows(groups: Sequence[Sequence[Row]], rank: int, world: int) -> list[Row]:
    """Selects the rows of a global batch that one rank trains on.

    Args:
        groups: The rows of each prompt of the global batch.
        rank: Index of this process.
        world: Number of processes.

    Returns:
        Every `world`-th group. A rank without a group gets the first one with an empty response mask, because every
        rank must take part in the step.
    """
    local_groups = groups[rank::world]
    if local_groups:
        return [row for group in local_groups for row in group]
    return [replace(row, response_mask=(False,) * len(row.response_mask)) for row in groups[0]]
