"""A generator that looks into the response store first and writes what it adds."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from distillkit.errors import StoreError
from distillkit.generators.progress import token_bar
from distillkit.generators.unfinished import UnfinishedError
from distillkit.interfaces import Generator
from distillkit.store import Provenance, ResponseStore
from distillkit.types import Prompts, Response, Sampling

_log = logging.getLogger(__name__)

RESPONSES_PER_SHARD = 128
"""Responses that are written at once: what a killed run has to write again at most, on each rank."""


@dataclass
class Ranks:
    """The processes that share the work.

    Args:
        rank: Number of this process.
        world: Number of processes.
        barrier: Waits for all of them.
    """

    rank: int = 0
    world: int = 1
    barrier: Callable[[], None] = lambda: None


class StoredGenerator(Generator):
    """Answers from the store, and has the rest written by another generator, each response once.

    Prompts are divided into groups that depend on nothing but the prompts and the number of ranks, and a group is
    written as one shard: a run that was killed and resumed writes the same responses in the same batches.

    Args:
        writer: Name under which responses are stored: teacher, student, ...
        inner: Writes the missing responses.
        store: Where they are kept.
        ranks: The processes that share the writing.
        fingerprint: Gives the fingerprint of the weights that the round is written with.
        current: Gives the fingerprint of the weights as they are, asked for only before something is written.
        refresh_inner: Hands the weights to `inner`.
    """

    def __init__(
        self,
        writer: str,
        inner: Generator,
        store: ResponseStore,
        ranks: Ranks,
        fingerprint: Callable[[int], str],
        current: Callable[[], str],
        refresh_inner: Callable[[Generator], None],
    ) -> None:
        self.writer, self.inner, self.store, self.ranks = writer, inner, store, ranks
        self.fingerprint, self.current, self.refresh_inner = fingerprint, current, refresh_inner

    def refresh(self, model: nn.Module, tokenizer: Any) -> None:
        """Hands the weights on."""
        self.inner.refresh(model, tokenizer)

    def generate(self, prompts: Prompts, sampling: Sampling) -> list[Response]:
        """One response per prompt, in their order; every rank asks for the same prompts and gets all responses.

        Raises:
            StoreError: If responses are missing and the weights that wrote the others have moved on.
        """
        provenance = Provenance(self.writer, self.fingerprint(prompts.round), sampling, prompts.round)
        known = self.store.read(provenance)
        self.ranks.barrier()  # none writes before all have looked: they must agree on whether anything is missing
        if any(prompt.id not in known for prompt in prompts):
            if self.current() != provenance.model:
                raise StoreError(
                    f"{self.store.folder} lacks responses of round {prompts.round} by {self.writer}, whose weights "
                    "have moved on since: resume from the checkpoint at the start of that round, or begin a new run."
                )
            try:
                self._write(prompts, sampling, provenance, set(known))
            finally:
                self.inner.release()
            self.ranks.barrier()
            known = self.store.read(provenance)
        return [known[prompt.id] for prompt in prompts]

    def _write(self, prompts: Prompts, sampling: Sampling, provenance: Provenance, known: set[str]) -> None:
        self.refresh_inner(self.inner)
        order = sorted(prompts, key=lambda prompt: (len(prompt.input_ids), prompt.id))
        start, num_tokens, num_responses, num_cut = time.perf_counter(), 0, 0, 0
        most = getattr(self.inner, "responses_per_shard", RESPONSES_PER_SHARD)
        size = min(most, -(-len(order) // self.ranks.world))  # a small round keeps every rank busy too
        groups = [order[first : first + size] for first in range(0, len(order), size)][
            self.ranks.rank :: self.ranks.world
        ]
        missing = [tuple(prompt for prompt in group if prompt.id not in known) for group in groups]
        shown = getattr(self.inner, "progress", True) and self.ranks.rank == 0
        with token_bar(f"{self.writer} writes", sum(map(len, missing)), shown):
            for group in filter(None, missing):
                responses = self._group(Prompts(group, prompts.round), sampling, provenance)
                self.store.write(provenance, responses)
                num_responses += len(responses)
                num_tokens += sum(len(response.token_ids) for response in responses)
                num_cut += sum(response.finish == "length" for response in responses)
        seconds = time.perf_counter() - start
        _log.info(
            "%s wrote %d responses in round %d: %d tokens in %.1f s, %.0f tokens/s; %d were cut at %d tokens; "
            "weights %s",
            self.writer, num_responses, prompts.round, num_tokens, seconds, num_tokens / seconds, num_cut,
            sampling.max_new_tokens, provenance.model,
        )  # fmt: skip

    def _group(self, group: Prompts, sampling: Sampling, provenance: Provenance) -> list[Response]:
        """The responses of one group; of one that has to stop what was finished is stored first."""
        try:
            return self.inner.generate(group, sampling)
        except UnfinishedError as error:
            if error.finished:
                self.store.write(provenance, error.finished)
            raise
