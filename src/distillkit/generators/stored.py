"""A generator that looks into the response store first and writes what it adds."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from distillkit.errors import GenerationError, StoreError
from distillkit.generators.progress import token_bar
from distillkit.interfaces import Generator
from distillkit.store import Provenance, ResponseStore
from distillkit.types import Prompt, Prompts, Response, Sampling

_log = logging.getLogger(__name__)

RESPONSES_PER_SHARD = 128
"""Responses that are written at once: what a killed run has to write again at most, on each rank."""


@dataclass
class Ranks:
    """The processes that share the work.

    Args:
        rank: Number of this process.
        world: Number of processes that wait for one another.
        barrier: Waits for all of them.
        shard: Number, from 0, of the part of the work that is these processes'.
        shards: Number of such parts; the others are done elsewhere, at any time, and nobody waits for them.
        stop: Set where a round is no longer wanted: nothing is written after the group that is being written.
    """

    rank: int = 0
    world: int = 1
    barrier: Callable[[], None] = lambda: None
    shard: int = 0
    shards: int = 1
    stop: threading.Event = field(default_factory=threading.Event)


def elsewhere(generators: Iterable[Generator]) -> set[tuple[Provenance, str]]:
    """The responses, by provenance and prompt, that generators were asked for and other shards have not written yet."""
    return {one for generator in generators for one in getattr(generator, "elsewhere", ())}


class StoredGenerator(Generator):
    """Answers from the store, and has the rest written by another generator, each response once.

    Prompts are divided into groups that depend on nothing but the prompts and the number of ranks, not on the number of
    shards, and a group is written as one shard of the store: a run that was killed and resumed writes the same
    responses in the same batches. Of a group whose generator gave up in the middle, what it had finished is a shard,
    and the rest is another once it is resumed.

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
        self.elsewhere: set[tuple[Provenance, str]] = set()
        self.num_responses, self.num_tokens = 0, 0  # that this process wrote

    def refresh(self, model: nn.Module, tokenizer: Any) -> None:
        """Hands the weights on."""
        self.inner.refresh(model, tokenizer)

    def figures(self) -> Mapping[str, float]:
        """Those of the generator that writes: nothing, where all responses were read."""
        return self.inner.figures()

    def generate(self, prompts: Prompts, sampling: Sampling) -> list[Response]:
        """One response per prompt, in their order; every rank asks for the same prompts and gets all responses.

        Raises:
            GenerationError: If the inner generator gives up, or the round is stopped; what it had finished is stored.
            StoreError: If responses are missing and the weights that wrote the others have moved on.
        """
        provenance = Provenance(self.writer, self.fingerprint(prompts.round), sampling, prompts.round)
        ids = [prompt.id for prompt in prompts]
        known = self.store.read(provenance)
        missing = set(known.missing(ids))
        self.ranks.barrier()  # none writes before all have looked: they must agree on whether anything is missing
        if missing:
            if self.current() != provenance.model:
                raise StoreError(
                    f"{self.store.folder} lacks responses of round {prompts.round} by {self.writer}, whose weights "
                    "have moved on since: resume from the checkpoint at the start of that round, or begin a new run."
                )
            try:
                self._write(prompts, provenance, missing)
            finally:
                self.inner.release()
            self.ranks.barrier()
            if self.ranks.stop.is_set():
                raise GenerationError(f"Round {prompts.round} was no longer wanted when {self.writer} wrote it.")
            known = self.store.read(provenance)
        if self.ranks.shards == 1:
            return known.take(ids)
        elsewhere = set(known.missing(ids))
        self.elsewhere = {one for one in self.elsewhere if one[0] != provenance or one[1] not in known}
        self.elsewhere |= {(provenance, name) for name in elsewhere}
        written = iter(known.take([name for name in ids if name not in elsewhere]))
        return [Response(name, (), "", "length") if name in elsewhere else next(written) for name in ids]

    def _write(self, prompts: Prompts, provenance: Provenance, missing: set[str]) -> None:
        start, num_tokens, num_responses, num_cut = time.perf_counter(), 0, 0, 0
        wanted = [tuple(prompt for prompt in group if prompt.id in missing) for group in self._groups(prompts)]
        shown = getattr(self.inner, "progress", True) and self.ranks.rank == 0
        if any(wanted) or self.ranks.world > 1:  # ranks that wait for one another take the weights together
            self.refresh_inner(self.inner)
        with token_bar(f"{self.writer} writes", sum(map(len, wanted)), shown):
            for group in filter(None, wanted):
                if self.ranks.stop.is_set():  # not an error here: the other ranks wait at the barrier
                    break
                responses = self._written(Prompts(group, prompts.round), provenance)
                num_responses += len(responses)
                num_tokens += sum(len(response.token_ids) for response in responses)
                num_cut += sum(response.finish == "length" for response in responses)
        seconds = time.perf_counter() - start
        self.num_responses += num_responses
        self.num_tokens += num_tokens
        _log.info(
            "%s wrote %d responses in round %d: %d tokens in %.1f s, %.0f tokens/s; %d were cut at %d tokens; "
            "weights %s",
            self.writer, num_responses, prompts.round, num_tokens, seconds, num_tokens / seconds, num_cut,
            provenance.sampling.max_new_tokens, provenance.model,
        )  # fmt: skip

    def _groups(self, prompts: Prompts) -> list[list[Prompt]]:
        """The groups that this process writes."""
        order = sorted(prompts, key=lambda prompt: (len(prompt.input_ids), prompt.id))
        own = self.inner.responses_per_shard
        most = RESPONSES_PER_SHARD if own is None else own
        size = min(most, -(-len(order) // self.ranks.world))  # a small round keeps every rank busy too
        groups = [order[first : first + size] for first in range(0, len(order), size)]
        return groups[self.ranks.shard :: self.ranks.shards][self.ranks.rank :: self.ranks.world]

    def _written(self, prompts: Prompts, provenance: Provenance) -> list[Response]:
        """A group's responses, which are in the store then: all of them, or those before the generator gave up."""
        try:
            responses = self.inner.generate(prompts, provenance.sampling)
        except GenerationError as error:
            finished = {response.prompt_id: response for response in error.finished}
            kept = [finished[prompt.id] for prompt in prompts if prompt.id in finished]
            if kept:
                self._keep(provenance, kept, prompts)
            raise
        self._keep(provenance, responses, prompts)
        return responses

    def _keep(self, provenance: Provenance, responses: list[Response], prompts: Prompts) -> None:
        lacking = set(self.store.read(provenance).missing([response.prompt_id for response in responses]))
        new = [response for response in responses if response.prompt_id in lacking]
        if len(new) < len(responses):
            _log.info("another run wrote %d of these responses meanwhile: its own are kept", len(responses) - len(new))
        self.store.write(provenance, new, prompts, type(self.inner).__name__)
