"""The rounds of a run: each written before it is trained on, or while the one before it is."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from distillkit.curators.brought import models_of
from distillkit.generators.writers import Writers
from distillkit.interfaces import Curator
from distillkit.types import Prompts, Row

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Written:
    """A round that is curated.

    Args:
        rows: Its rows.
        figures: What the generators counted while they wrote it.
        seconds: How long that took.
    """

    rows: Sequence[Row]
    figures: dict[str, float]
    seconds: float


class Rounds:
    """Has the rounds of a run curated, in the thread that trains or, one round ahead, in a thread of its own.

    A round that is written ahead is written with the weights of the start of the round before: it lags by one round.
    What is written ahead is in the store before a checkpoint is saved, so that a run resumes as if it had been left
    alone.

    Args:
        curator: Makes the rows.
        writers: The generators that it asks.
        step: Gives the number of optimizer steps that have been taken.
        overlap: Whether rounds are written ahead, or the device on which the copies lie that write them.
        device: The device that trains.
    """

    def __init__(
        self, curator: Curator, writers: Writers, step: Callable[[], int], overlap: bool | str, device: torch.device
    ) -> None:
        self.curator, self.writers, self.step = curator, writers, step
        self.ahead = None
        if overlap is not False:
            self.ahead = device if overlap is True else torch.device(overlap)
            writers.ranks.barrier = _own_barrier()
        self.figures: dict[str, float] = {}
        self.seconds = 0.0  # that training waited for rows
        self.taken: dict[int, int] = {}  # the step at which the weights of the last two rounds were taken
        self._begun: tuple[int, Future[Written]] | None = None

    def prepare(self, prompts: Prompts) -> None:
        """Has what is written once written for all prompts of the run."""
        start = time.perf_counter()
        self.curator.prepare(prompts, self.writers.generators)
        self.seconds += time.perf_counter() - start

    def rows(self, prompts: Prompts) -> list[Row]:
        """The rows of a round: those that were written ahead, or written now."""
        number, start = prompts.round, time.perf_counter()
        if self.ahead is None:
            self.curator.begin(number)
            written = self._curate(prompts)
        else:
            if self._begun is None or self._begun[0] != number:
                self.wait()
                self.begin(prompts)
            assert self._begun is not None
            written = self._begun[1].result()
            self._begun = None
            lag = self.step() - self.taken[number]
            _log.info(
                "Round %d was written in %.1f s with weights that lag by %d steps; training waited for %.1f s.",
                number, written.seconds, lag, time.perf_counter() - start,
            )  # fmt: skip
            written.figures["lag"] = float(lag)
        self.figures = written.figures
        self.seconds += time.perf_counter() - start
        return list(written.rows)

    def begin(self, prompts: Prompts) -> None:
        """Has a round written ahead, by copies of the models as they are now."""
        assert self.ahead is not None, "nothing is written ahead"
        number = prompts.round
        self.taken = {one: step for one, step in self.taken.items() if one >= number - 1} | {
            number: self.taken.get(number, self.step())  # a resumed run reads the rounds that it had written
        }
        self.writers.hold(self.ahead, "student" in models_of(self.curator))
        self.curator.begin(number)
        found: Future[Written] = Future()
        place = _stream(self.ahead)

        def write() -> None:
            try:
                with place:
                    found.set_result(self._curate(prompts))
            except BaseException as error:
                found.set_exception(error)

        # A daemon, because an error elsewhere must end the process, and what is stored is whole at any moment.
        threading.Thread(target=write, name=f"round {number}", daemon=True).start()
        self._begun = (number, found)

    def wait(self) -> None:
        """Waits until what is being written ahead is in the store; an error of it is raised when it is asked for."""
        if self._begun is not None:
            self._begun[1].exception()

    def close(self) -> None:
        """Stops what is being written ahead, after the group of prompts that is being written."""
        self.writers.ranks.stop.set()
        self.wait()
        self.writers.ranks.stop.clear()
        self._begun = None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, once nothing is being written."""
        self.wait()
        return {"rounds": self.writers.rounds, "taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what was saved."""
        self.writers.rounds |= state["rounds"]
        self.taken = dict(state["taken"])

    def _curate(self, prompts: Prompts) -> Written:
        start = time.perf_counter()
        rows = self.curator.curate(prompts, self.writers.generators)
        return Written(rows, self.writers.figures(), time.perf_counter() - start)


def _own_barrier() -> Callable[[], None]:
    """A barrier of the ranks that a second thread may use: the collectives of two threads must not mix."""
    if not (dist.is_available() and dist.is_initialized()):
        return lambda: None
    group = dist.new_group(backend="gloo", timeout=timedelta(days=7))  # ranks may write for hours
    return lambda: dist.barrier(group)


def _stream(device: torch.device) -> AbstractContextManager[Any]:
    """A stream of its own on a GPU, in which work begins when what the device was given before is done."""
    if device.type != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)
