"""A teacher whose scores are kept on disk, so that no row is scored twice.

Letters: N response positions, D hidden width, K tokens that are kept, V vocabulary.
"""

import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import distributed, nn

from distillkit.data.collate import collate
from distillkit.errors import ConfigError, ModelError, StoreError
from distillkit.fetch import cache_dir
from distillkit.interfaces import Teacher
from distillkit.models.fingerprint import fingerprint
from distillkit.models.scoring import output_head
from distillkit.score_cache import ScoreCache
from distillkit.teachers.card import Card, read_card, read_head, write_card, write_head
from distillkit.teachers.kept import Kept, KeptHidden, KeptTopK, plain_head
from distillkit.types import Batch, Row, Scores

_log = logging.getLogger(__name__)

BATCH_TOKENS = {"cuda": 8192, "cpu": 2048}
"""Tokens of a batch that is scored ahead, padding included. A GPU is busy with 8192 and their activations stay below a
gigabyte for 7B parameters; a CPU gains nothing from more than 2048, and its caches hold less."""


class CachedTeacher(Teacher):
    """Another teacher, whose scores are kept on disk: what it says about a response is computed once.

    The rows of a round are scored before the round begins, divided over the ranks, and the model then leaves the
    memory. A run whose rows are all known never loads it. The folder may be shared by runs, also at the same time.

    Args:
        teacher: The teacher whose scores are kept.
        keep: `hidden` keeps hidden states, from which the scores are the teacher's own, bit for bit; `top_k` keeps the
            most likely tokens and all others as one, which is less to store and an approximation.
        k: Number of tokens that `top_k` keeps of each position, at least 1 and below the size of the vocabulary.
        folder: Where scores are kept; None is a folder of the teacher's own in the user's cache.
        unload: Whether the model leaves the memory once a round is scored. Loading it again takes seconds: False suits
            rounds of a few steps, each of which has new responses to score.

    Raises:
        ConfigError: If `k` is below 1, or `folder` is None and the teacher's weights have no name.
    """

    def __init__(
        self,
        teacher: Teacher,
        keep: Literal["hidden", "top_k"] = "hidden",
        k: int = 64,
        folder: str | None = None,
        unload: bool = True,
    ) -> None:
        if not teacher.shares_tokens:
            raise ConfigError(
                f"CachedTeacher keeps scores of the run's tokens, and a {type(teacher).__name__} has others."
            )
        if k < 1:
            raise ConfigError(f"CachedTeacher.k must be at least 1, got {k}.")
        if folder is None and type(teacher).identity is Teacher.identity:
            raise ConfigError(
                f"CachedTeacher.folder is missing: a {type(teacher).__name__} doesn't say which weights it has "
                "(Teacher.identity), so that its scores need a folder of their own."
            )
        self.teacher, self.keep, self.k, self.folder, self.unloads = teacher, keep, k, folder, unload
        self._device: torch.device | None = None
        self._root, self._card = Path(), Card(None, None, 0)
        self._vocab = 0
        self._kept: Kept | None = None
        self._cache: ScoreCache | None = None

    def setup(self, device: torch.device) -> None:
        """Loads the head that was kept, or the teacher if nothing is known of it yet.

        Raises:
            ConfigError: If `k` is not below the size of the vocabulary.
            ModelError: If the teacher's hidden states can't be kept, or nothing names its weights.
            StoreError: If the folder holds another teacher's scores.
        """
        if self._device is not None:
            return
        identity = self.teacher.identity()
        self._root = self._place(identity)
        card = read_card(self._root)
        # A name that differs may still be of the same weights: a copied folder, another machine.
        known = card is not None and identity in (None, card.identity)
        head = read_head(self._root / "hidden", card, device) if known and card and self.keep == "hidden" else None
        self._device = device
        if card is None or not known or (self.keep == "hidden" and head is None):
            card, head = self._introduce(card, identity)
        self._card, self._vocab = card, card.width
        self._check_k(card.width)
        self._kept = None if head is None else KeptHidden(head)

    def _place(self, identity: str | None) -> Path:
        if self.folder is not None:
            return Path(self.folder).expanduser()
        if identity is None:
            raise ModelError("The teacher's weights are missing, which name its cache: set CachedTeacher.folder.")
        return cache_dir() / "teachers" / hashlib.sha256(identity.encode()).hexdigest()[:16]

    def _introduce(self, known: Card | None, identity: str | None) -> tuple[Card, Any]:
        """Loads the teacher and writes down what is to be known without it."""
        self._load()
        model = self.teacher.model
        own = self.teacher.fingerprint()
        if own is None and model is not None:
            own = fingerprint(model)
        if known is not None and known.fingerprint != own:
            raise StoreError(
                f"{self._root} holds scores of the teacher {known.fingerprint}, and this one is {own}: "
                "name another CachedTeacher.folder."
            )
        card, head = Card(identity, own, self.teacher.vocab_size), None
        if self.keep == "hidden":
            if model is None:
                raise ModelError("CachedTeacher.keep: hidden needs a teacher with a model in this process: use top_k.")
            head = plain_head(output_head(model, card.width))
            if _rank() == 0:
                write_head(self._root / "hidden", card, head)
        if _rank() == 0:
            write_card(self._root, card)
        return card, head

    def _load(self) -> None:
        assert self._device is not None, "setup comes first"
        self.teacher.setup(self._device)
        if self._vocab:
            self.teacher.limit_vocab(self._vocab)

    def unload(self) -> None:
        """Frees the memory of the teacher's model."""
        self.teacher.unload()

    def prepare(self, rows: Sequence[Row]) -> None:
        """Scores the rows that are not known yet, each once, the ranks a part each, and unloads the model.

        A run that was killed and goes on forms the very batches that it would have formed: rows are sorted, and a
        batch is on disk as a whole or not at all.
        """
        cache = self._opened()
        cache.refresh()
        unique = {row.key: row for row in rows if any(row.response_mask)}
        missing = [unique[key] for key in cache.missing(list(unique))]
        _barrier()  # none writes before all have looked: they must agree on what is missing
        assert self._device is not None
        limit = BATCH_TOKENS.get(self._device.type, BATCH_TOKENS["cuda"])
        batches = list(_batches(missing, limit))[_rank() :: _world()]
        if batches:
            self._score_ahead(batches, cache)
        _barrier()
        cache.refresh()
        if self.unloads:
            self.unload()

    def _score_ahead(self, batches: Sequence[Sequence[Row]], cache: ScoreCache) -> None:
        assert self._device is not None
        start, num_positions, num_bytes = time.perf_counter(), 0, 0
        for rows in batches:
            # Padding is masked, so that any token will do; there is one of id 0.
            batch = collate(rows, pad_id=0).to(self._device)
            num_positions += batch.num_tokens
            num_bytes += self._add(batch, cache)
        cache.flush()
        _log.info(
            "the teacher scored %d rows, %d positions in %.1f s; %d bytes to %s",
            sum(map(len, batches)), num_positions, time.perf_counter() - start, num_bytes, cache.folder,
        )  # fmt: skip

    @torch.no_grad()
    def _add(self, batch: Batch, cache: ScoreCache) -> int:
        """Scores a batch and keeps those of its rows that are not kept yet; the number of bytes."""
        self._load()
        assert self._kept is not None
        # In the teacher's own type, whatever the student is trained in.
        with torch.autocast(batch.positions.device.type, enabled=False):
            packed = self._kept.pack(self.teacher.score(batch), batch.targets)
        missing = set(cache.missing([key for key, length in zip(batch.keys, batch.lengths, strict=True) if length]))
        parts = {name: torch.split(tensor, list(batch.lengths)) for name, tensor in packed.items()}
        rows = {key: place for place, key in enumerate(batch.keys) if key in missing}  # each once
        kept = {name: torch.cat([part[place] for place in rows.values()]) for name, part in parts.items()}
        cache.write(list(rows), [batch.lengths[place] for place in rows.values()], kept)
        return sum(tensor.nbytes for tensor in kept.values())

    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        """Scores of the batch's N response positions; rows that were not prepared are scored now, and kept."""
        cache = self._opened()
        assert self._kept is not None
        keys = [key for key, length in zip(batch.keys, batch.lengths, strict=True) if length]
        if cache.missing(keys):
            cache.refresh()  # another rank may have had them
        if cache.missing(keys):
            self._add(batch, cache)
            cache.flush()
        return self._kept.unpack(cache.read(keys, batch.positions.device), self._vocab)

    def _opened(self) -> ScoreCache:
        """The cache, which depends on the vocabulary if only the most likely tokens of it are kept."""
        assert self._device is not None, "setup comes first"
        if self._kept is None:
            self._kept = KeptTopK(self.k, self._vocab)
        if self._cache is None:
            settings = {"teacher": self._card.fingerprint, **self._kept.settings}
            self._cache = ScoreCache(self._root / self._kept.name, self._kept.columns, settings, _rank())
        return self._cache

    def tokenizer(self) -> Any:
        """The teacher's tokenizer."""
        return self.teacher.tokenizer()

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self._vocab

    def limit_vocab(self, size: int) -> None:
        """Cuts the scores to the first `size` tokens; the most likely tokens are then those among them.

        Raises:
            ConfigError: If `k` is not below `size`.
        """
        self._check_k(size)
        self._vocab = min(self._vocab, size)
        if self.keep == "top_k":
            self._kept = self._cache = None

    def _check_k(self, size: int) -> None:
        if self.keep == "top_k" and self.k >= size:
            raise ConfigError(f"CachedTeacher.k must be below the {size} tokens of the vocabulary, got {self.k}.")

    def identity(self) -> str | None:
        """That of the teacher whose scores are kept."""
        return self.teacher.identity()

    def fingerprint(self) -> str | None:
        """The fingerprint of the teacher's weights, from the folder; None before `setup`."""
        return self._card.fingerprint

    @property
    def model(self) -> nn.Module | None:
        """The teacher's model, which is loaded if it is not there."""
        if self._device is not None:
            self._load()
        return self.teacher.model

    @property
    def scorer(self) -> nn.Module | None:
        """The head if hidden states are kept, else nothing; the model is not loaded."""
        return self._kept.head.module if isinstance(self._kept, KeptHidden) else None


def _batches(rows: Sequence[Row], limit: int) -> Iterator[list[Row]]:
    """Rows of similar length, the shortest first, of at most `limit` tokens with padding, or one row."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: (len(row.input_ids), row.key)):
        if batch and (len(batch) + 1) * len(row.input_ids) > limit:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _rank() -> int:
    return distributed.get_rank() if _many() else 0


def _world() -> int:
    return distributed.get_world_size() if _many() else 1


def _barrier() -> None:
    if _many():
        distributed.barrier()


def _many() -> bool:
    return distributed.is_available() and distributed.is_initialized()
