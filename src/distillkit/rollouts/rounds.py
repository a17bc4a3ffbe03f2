"""The rounds of a run: each is generated before it is trained on, or while the previous one is."""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from distillkit.curators.base import models_of
from distillkit.devices.streams import writer_stream
from distillkit.errors import DataError
from distillkit.interfaces import Curator
from distillkit.rollouts.pool import GeneratorPool
from distillkit.rollouts.row_checks import check_rows
from distillkit.types import Prompts, Row

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CuratedRound:
    """The result of curating a round.

    Args:
        rows: The round's rows.
        metrics: Metrics of the generators in this round.
        seconds: Time that the curation took.
    """

    rows: Sequence[Row]
    metrics: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class _Prefetched:
    """A round that is curated in another thread."""

    round_index: int
    future: Future[CuratedRound]


class RoundRunner:
    """Runs the curation of each round: in the training thread or, one round ahead, in a separate thread.

    A prefetched round is generated with the weights at the start of the previous round: it lags by one round. Its
    responses are in the store before a checkpoint is saved, so that a resumed run equals an uninterrupted one.

    Args:
        curator: Curator of the rows.
        generator_pool: The generators that the curator uses. Prefetched rounds need a barrier for a second thread.
        current_step: Returns the number of optimizer steps that have been taken.
        overlap: Whether rounds are prefetched; or the device of the copies that generate them.
        device: The training device.
        on_rows: Called with the rows of each round, before training on them starts.
    """

    def __init__(
        self,
        curator: Curator,
        generator_pool: GeneratorPool,
        current_step: Callable[[], int],
        overlap: bool | str,
        device: torch.device,
        on_rows: Callable[[list[Row]], None] = lambda rows: None,
    ) -> None:
        self.curator, self.generator_pool, self.current_step = curator, generator_pool, current_step
        self.on_rows = on_rows
        self.prefetch_device = None
        if overlap is not False:
            self.prefetch_device = device if overlap is True else torch.device(overlap)
        self.metrics: dict[str, float] = {}
        self.seconds = 0.0  # time that training waited for rows
        self.snapshot_steps: dict[int, int] = {}  # by round, the last two: step at which its weights were copied
        self._prefetched: _Prefetched | None = None

    @property
    def length(self) -> str | int:
        """Length of a round: `once`, `epoch`, or a number of optimizer steps."""
        return self.curator.rounds

    def prepare(self, prompts: Prompts) -> None:
        """Generates what the curator needs once, for all prompts of the run."""
        start = time.perf_counter()
        self.curator.prepare(prompts, self.generator_pool.generators)
        self.seconds += time.perf_counter() - start

    def rows(self, prompts: Prompts) -> list[Row]:
        """Returns the rows of a round: prefetched ones, or newly curated ones.

        Raises:
            DataError: If there is nothing to train on in any of several rows.
        """
        round_index, start = prompts.round, time.perf_counter()
        if self.prefetch_device is None:
            self.curator.on_round_start(round_index)
            curated = self._curate(prompts)
        else:
            curated = self._wait_for_prefetched(prompts).result()
            self._prefetched = None
            lag = self.current_step() - self.snapshot_steps[round_index]
            _log.info(
                "Round %d was generated in %.1f s with weights that lag by %d steps; training waited for %.1f s.",
                round_index,
                curated.seconds,
                lag,
                time.perf_counter() - start,
            )
            curated.metrics["lag"] = float(lag)
        self.metrics = curated.metrics
        self.seconds += time.perf_counter() - start
        rows = list(curated.rows)
        _require_tokens(rows, round_index)
        self.on_rows(rows)
        return rows

    def _wait_for_prefetched(self, prompts: Prompts) -> Future[CuratedRound]:
        """The future of the round; starts its curation if another round, or none, was prefetched."""
        if self._prefetched is None or self._prefetched.round_index != prompts.round:
            self.wait()
            self.prefetch(prompts)
        assert self._prefetched is not None
        return self._prefetched.future

    def prefetch(self, prompts: Prompts) -> None:
        """Starts to curate a round in another thread, with copies of the current models."""
        assert self.prefetch_device is not None, "nothing is prefetched"
        round_index = prompts.round
        recent = {earlier: step for earlier, step in self.snapshot_steps.items() if earlier >= round_index - 1}
        # A resumed run reads the rounds that it had generated: their steps stay those of the checkpoint.
        self.snapshot_steps = recent | {round_index: self.snapshot_steps.get(round_index, self.current_step())}
        self.generator_pool.snapshot_student(self.prefetch_device, "student" in models_of(self.curator))
        self.curator.on_round_start(round_index)
        future: Future[CuratedRound] = Future()
        stream = writer_stream(self.prefetch_device)

        def curate() -> None:
            try:
                with stream:
                    future.set_result(self._curate(prompts))
            except BaseException as error:
                future.set_exception(error)

        # A daemon: an error elsewhere must end the process, and the store is consistent at any moment.
        threading.Thread(target=curate, name=f"round {round_index}", daemon=True).start()
        self._prefetched = _Prefetched(round_index, future)

    def wait(self) -> None:
        """Waits until the prefetched round is in the store; an error in it is raised when its rows are requested."""
        if self._prefetched is not None:
            self._prefetched.future.exception()

    def close(self) -> None:
        """Stops prefetching, after the group of prompts that is being generated."""
        self.generator_pool.ranks.stop.set()
        self.wait()
        self.generator_pool.ranks.stop.clear()
        self._prefetched = None

    def state_dict(self) -> dict[str, dict[int, str] | dict[int, int]]:
        """Returns the state for a checkpoint, after prefetching has finished."""
        self.wait()
        return {"rounds": self.generator_pool.round_fingerprints, "taken": self.snapshot_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state from a checkpoint."""
        self.generator_pool.round_fingerprints |= state["rounds"]
        self.snapshot_steps = dict(state["taken"])

    def forget(self) -> None:
        """Forgets the weights of all rounds but the first: from now on rounds are numbered in another way."""
        fingerprints = self.generator_pool.round_fingerprints
        self.generator_pool.round_fingerprints = {index: name for index, name in fingerprints.items() if index == 0}
        self.snapshot_steps = {}

    def _curate(self, prompts: Prompts) -> CuratedRound:
        start = time.perf_counter()
        rows = self.curator.curate(prompts, self.generator_pool.generators)
        check_rows(self.curator, prompts, rows)
        return CuratedRound(rows, self.generator_pool.metrics(), time.perf_counter() - start)


def _require_tokens(rows: Sequence[Row], round_index: int) -> None:
    if any(any(row.response_mask) or row.pending for row in rows):
        return
    writers = ", ".join(sorted({row.writer for row in rows}))
    message = f"None of {len(rows)} rows of round {round_index} ({writers}) has a token to train on"
    if len(rows) > 1:
        raise DataError(f"{message}: the responses are empty. Look at them with `distillkit store show`.")
    _log.warning("%s: its step changes nothing.", message)
