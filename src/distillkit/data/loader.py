"""Batches of an epoch, made of responses that are written a round at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from distillkit.data.collate import Layout, collate
from distillkit.types import Batch, Prompts, Row

Curate = Callable[[Prompts], Sequence[Row]]


class RoundLoader:
    """An epoch's micro-batches for one rank; a sized iterable with state, as a Lightning data loader may be.

    The order of the prompts depends on the seed and the epoch alone. At the start of each round its prompts are
    curated; the first micro-batch of each optimizer step carries the others of the step along, so that units can be
    counted before a gradient is taken.

    Args:
        prompts: All prompts of the run.
        prepare: Called once with all prompts, before the first round.
        curate: Gives the rows of a round's prompts; every rank asks for the prompts of all ranks.
        pad_id: Token id that pads a row.
        batch_size: Prompts in a micro-batch of one rank; a prompt may have several rows.
        accumulate: Micro-batches in an optimizer step.
        rounds: How long a round lasts: `once`, `epoch`, or a number of optimizer steps.
        epoch: Gives the number of the current epoch.
        shuffle: Whether each epoch has an order of its own.
        seed: Seed of the order.
        rank: Number of this process.
        world: Number of processes.
        layout: How rows are laid out, as `collate` says.
        bucket: What the length of packed rows is a multiple of.
        ahead: Told the prompts of the next round when one begins; None where rounds are written one after another.
        reaches: Says whether the run gets to a step of an epoch: a round past its end is not written.
    """

    def __init__(
        self,
        prompts: Prompts,
        prepare: Callable[[Prompts], None],
        curate: Curate,
        pad_id: int,
        batch_size: int,
        accumulate: int = 1,
        rounds: str | int = "epoch",
        epoch: Callable[[], int] = lambda: 0,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        layout: Layout = "shared",
        bucket: int = 1,
        ahead: Callable[[Prompts], None] | None = None,
        reaches: Callable[[int, int], bool] = lambda epoch, step: True,
    ) -> None:
        self.prompts, self.prepare, self.curate, self.pad_id = prompts, prepare, curate, pad_id
        self.batch_size, self.accumulate, self.rounds, self.epoch = batch_size, accumulate, rounds, epoch
        self.shuffle, self.seed, self.rank, self.world = shuffle, seed, rank, world
        self.layout: Layout = layout
        self.bucket, self.ahead, self.reaches = bucket, ahead, reaches
        self._done = self._resume_at = 0
        self._prepared = False

    def __len__(self) -> int:
        return -(-len(self.prompts) // (self.batch_size * self.world))

    def state_dict(self) -> dict[str, Any]:
        """How many micro-batches of the epoch have been given."""
        return {"done": self._done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration goes on where the saved one stood."""
        self._done = self._resume_at = state["done"]

    def __iter__(self) -> Iterator[Batch]:
        epoch = self.epoch()
        steps = self._steps(epoch)
        self._done, self._resume_at = self._resume_at % max(len(self), 1), 0
        length = self.rounds if isinstance(self.rounds, int) else len(steps)
        rows: dict[int, list[Row]] = {}
        if not self._prepared:
            self.prepare(self.prompts)
            self._prepared = True
        for number in range(self._done // self.accumulate, len(steps)):
            if number % length == 0 or not rows:
                first = number // length * length
                rows = self._round(epoch, steps, first, length)
            window = tuple(self._batch(batch, rows) for batch in steps[number])
            for place, batch in enumerate(window):
                if number * self.accumulate + place < self._done:
                    continue
                self._done += 1
                yield replace(batch, window=window) if place == 0 else batch

    def _steps(self, epoch: int) -> list[list[list[int]]]:
        """Places of the prompts of each global micro-batch of each optimizer step."""
        order = list(range(len(self.prompts)))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(len(order), generator=generator).tolist()
        size = self.batch_size * self.world
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        return [batches[start : start + self.accumulate] for start in range(0, len(batches), self.accumulate)]

    def first_round(self) -> Prompts:
        """The prompts of round 0, the first that an iteration curates."""
        steps = self._steps(0)
        return self._asked(0, steps, 0, self.rounds if isinstance(self.rounds, int) else len(steps))

    def _round(self, epoch: int, steps: list[list[list[int]]], first: int, length: int) -> dict[int, list[Row]]:
        """The rows of the round that begins with step `first`, by their prompt's place."""
        places = _places(steps[first : first + length])
        rows = self.curate(self._asked(epoch, steps, first, length))
        if self.ahead is not None:
            following = (epoch, first + length) if first + length < len(steps) else (epoch + 1, 0)
            if self.reaches(*following):
                own = steps if following[0] == epoch else self._steps(epoch + 1)
                self.ahead(self._asked(following[0], own, following[1], length))
        size = len(rows) // len(places)
        assert size > 0, "a curator gives every prompt a row"
        assert len(rows) == size * len(places), "a curator gives every prompt the same number of rows"
        return {place: list(rows[number * size : (number + 1) * size]) for number, place in enumerate(places)}

    def _asked(self, epoch: int, steps: list[list[list[int]]], first: int, length: int) -> Prompts:
        """The prompts of that round."""
        places = _places(steps[first : first + length])
        number = epoch * -(-len(steps) // length) + first // length
        return Prompts(tuple(self.prompts[place] for place in places), number)

    def _batch(self, places: Sequence[int], rows: dict[int, list[Row]]) -> Batch:
        groups = [rows[place] for place in places]
        # A group that is not trained on would only be padded for: one stands in where a whole batch is such.
        trained = [group for group in groups if any(any(row.response_mask) for row in group)] or groups[:1]
        own = rank_rows(trained, self.rank, self.world)
        size = len(groups[0])
        pair = [number // size for number in range(len(own))]  # by place: two groups may be of one prompt (replay)
        return collate(own, self.pad_id, self.layout, self.bucket, pair)


def _places(steps: list[list[list[int]]]) -> list[int]:
    """The places of all prompts of some optimizer steps, in order."""
    return [place for step in steps for batch in step for place in batch]


class FixedLoader:
    """Batches that are the same each time; a plain list would be taken for a list of loaders.

    Args:
        batches: The batches.
    """

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def rank_rows(groups: Sequence[Sequence[Row]], rank: int, world: int) -> list[Row]:
    """The rows of a global batch that one rank trains on.

    Args:
        groups: The rows of each prompt of the global batch.
        rank: Number of this process.
        world: Number of processes.

    Returns:
        Every `world`-th group. A rank that would have none gets the first group with nothing to train on, because every
        rank must take part in the step.
    """
    own = groups[rank::world]
    if own:
        return [row for group in own for row in group]
    return [replace(row, response_mask=(False,) * len(row.response_mask)) for row in groups[0]]
