"""Cached teacher: scores are stored on disk, so that no row is scored twice.

Letters: N response positions, D hidden width, K stored tokens of a position, V vocabulary.
"""

import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from distillkit.chunked.output_head import OutputHead
from distillkit.data.collate import collate
from distillkit.devices import distributed
from distillkit.errors import ConfigError, ModelError, StoreError
from distillkit.interfaces import Teacher
from distillkit.models.fingerprint import fingerprint
from distillkit.models.heads import output_head
from distillkit.remote.wheels import cache_dir
from distillkit.storage.scores import ScoreCache
from distillkit.teachers.metadata import TeacherMetadata, read_head, read_metadata, write_head, write_metadata
from distillkit.teachers.score_format import HiddenFormat, ScoreFormat, TopKFormat, plain_head
from distillkit.types import Batch, Row, Scores, Tokenizer

_log = logging.getLogger(__name__)

BATCH_TOKENS = {"cuda": 8192, "cpu": 2048}
"""Tokens of a batch when a round is scored in advance, padding included. 8192 keep a GPU busy with less than a gigabyte
of activations for 7B parameters; a CPU gains nothing from more than 2048, which no longer fit its caches."""


class CachedTeacher(Teacher):
    """A wrapper that stores another teacher's scores on disk, so that each response is scored once.

    The rows of a round are scored before the round begins, divided among the ranks, and the model is then unloaded. A
    run whose rows are all cached never loads it. Several runs may share the folder, also at the same time.

    Args:
        teacher: The teacher whose scores are cached.
        keep: What is stored. `hidden`: hidden states, from which the teacher's scores are restored bit for bit;
            `top_k`: the k most likely tokens, and all others together, which is smaller and an approximation.
        k: Number of tokens that `top_k` stores per position, at least 1 and below the vocabulary size.
        folder: Folder of the scores; None is one named after the teacher's weights, in the user's cache.
        unload: Whether the model is unloaded once a round is scored. Loading it again takes seconds: use False for
            rounds of a few steps, each with new responses to score.

    Raises:
        ConfigError: If `k` is below 1, the teacher has another tokenizer, or `folder` is None and the teacher does not
            name its weights.
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
                f"CachedTeacher stores scores of the student's tokens, and a {type(teacher).__name__} has others. "
                "Use that teacher without CachedTeacher."
            )
        if k < 1:
            raise ConfigError(f"CachedTeacher.k must be at least 1, got {k}.")
        if folder is None and type(teacher).identity is Teacher.identity:
            raise ConfigError(
                f"CachedTeacher.folder is missing. A {type(teacher).__name__} does not name its weights "
                "(Teacher.identity), so name a folder for its scores."
            )
        self.teacher, self.keep, self.k, self.folder, self.unloads = teacher, keep, k, folder, unload
        self._device: torch.device | None = None
        self._root, self._metadata = Path(), TeacherMetadata(None, None, 0)
        self._vocab = 0
        self._format: ScoreFormat | None = None
        self._cache: ScoreCache | None = None

    def setup(self, device: torch.device) -> None:
        """Loads the cached head, or the teacher if the folder has no metadata for it yet.

        Raises:
            ConfigError: If `k` is not below the size of the vocabulary.
            ModelError: If the teacher's hidden states can't be cached, or its weights have no name.
            StoreError: If the folder has another teacher's scores.
        """
        if self._device is not None:
            return
        identity = self.teacher.identity()
        self._root = self._cache_folder(identity)
        metadata = read_metadata(self._root)
        # Another identity may still name the same weights (a copied folder, another machine): load and compare them.
        same = metadata is not None and identity in (None, metadata.identity)
        cached = metadata if same and self.keep == "hidden" else None
        head = None if cached is None else read_head(self._root / "hidden", cached, device)
        self._device = device
        if metadata is None or not same or (self.keep == "hidden" and head is None):
            metadata, head = self._write_metadata(metadata, identity)
        self._metadata, self._vocab = metadata, metadata.width
        self._check_k(metadata.width)
        self._format = None if head is None else HiddenFormat(head)

    def _cache_folder(self, identity: str | None) -> Path:
        if self.folder is not None:
            return Path(self.folder).expanduser()
        if identity is None:
            raise ModelError("The teacher has no weight files to name its cache after. Set CachedTeacher.folder.")
        return cache_dir() / "teachers" / hashlib.sha256(identity.encode()).hexdigest()[:16]

    def _write_metadata(
        self, stored: TeacherMetadata | None, identity: str | None
    ) -> tuple[TeacherMetadata, OutputHead | None]:
        """Loads the teacher, and writes its metadata and head, which later runs read instead of the model."""
        self._load()
        model = self.teacher.model
        weights = self.teacher.fingerprint()
        if weights is None and model is not None:
            weights = fingerprint(model)
        if stored is not None and stored.fingerprint != weights:
            raise StoreError(
                f"{self._root} holds scores of the teacher {stored.fingerprint}, and this one is {weights}. "
                "Name another CachedTeacher.folder."
            )
        metadata, head = TeacherMetadata(identity, weights, self.teacher.vocab_size), None
        if self.keep == "hidden":
            if model is None:
                raise ModelError("CachedTeacher.keep: hidden needs a teacher with a model in this process. Use top_k.")
            head = plain_head(output_head(model, metadata.width))
            if distributed.rank() == 0:
                write_head(self._root / "hidden", metadata, head)
        if distributed.rank() == 0:
            write_metadata(self._root, metadata)
        return metadata, head

    def _load(self) -> None:
        assert self._device is not None, "setup comes first"
        self.teacher.setup(self._device)
        if self._vocab:
            self.teacher.limit_vocab(self._vocab)

    def unload(self) -> None:
        """Frees the memory of the teacher's model."""
        self.teacher.unload()

    def prepare(self, rows: Sequence[Row]) -> None:
        """Scores the rows that are not cached yet, each once, divided among the ranks, and unloads the model.

        A run that is resumed after a crash forms the same batches as an uninterrupted one: rows are sorted, and a
        batch is on disk completely or not at all.
        """
        cache = self._open_cache()
        cache.refresh()
        unique = {row.key: row for row in rows if any(row.response_mask)}
        missing = [unique[key] for key in cache.missing(list(unique))]
        distributed.barrier()  # no rank writes before all have read: they must agree on what is missing
        assert self._device is not None
        limit = BATCH_TOKENS.get(self._device.type, BATCH_TOKENS["cuda"])
        batches = list(_batches(missing, limit))[distributed.rank() :: distributed.world_size()]
        if batches:
            self._score_batches(batches, cache)
        distributed.barrier()
        cache.refresh()
        if self.unloads:
            self.unload()

    def _score_batches(self, batches: Sequence[Sequence[Row]], cache: ScoreCache) -> None:
        assert self._device is not None
        start, num_positions, num_bytes = time.perf_counter(), 0, 0
        for rows in batches:
            # Padding is masked, so any token will do; id 0 always exists.
            batch = collate(rows, pad_id=0).to(self._device)
            num_positions += batch.num_tokens
            num_bytes += self._score_batch(batch, cache)
        cache.flush()
        _log.info(
            "the teacher scored %d rows, %d positions in %.1f s; %d bytes to %s",
            sum(map(len, batches)),
            num_positions,
            time.perf_counter() - start,
            num_bytes,
            cache.folder,
        )

    @torch.no_grad()
    def _score_batch(self, batch: Batch, cache: ScoreCache) -> int:
        """Scores a batch and stores those of its rows that are not cached yet; returns the number of bytes."""
        self._load()
        assert self._format is not None
        # In the teacher's dtype, whatever precision the student is trained in.
        with torch.autocast(batch.positions.device.type, enabled=False):
            columns = self._format.pack(self.teacher.score(batch), batch.targets)
        missing = set(cache.missing([key for key, length in zip(batch.keys, batch.lengths, strict=True) if length]))
        parts = {name: torch.split(tensor, list(batch.lengths)) for name, tensor in columns.items()}
        rows = {key: row for row, key in enumerate(batch.keys) if key in missing}  # each once
        new = {name: torch.cat([part[row] for row in rows.values()]) for name, part in parts.items()}
        cache.write(list(rows), [batch.lengths[row] for row in rows.values()], new)
        return sum(tensor.nbytes for tensor in new.values())

    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        """Scores of the batch's N response positions; rows that are not cached are scored now and stored."""
        cache = self._open_cache()
        assert self._format is not None
        keys = [key for key, length in zip(batch.keys, batch.lengths, strict=True) if length]
        if cache.missing(keys):
            cache.refresh()  # another rank may have scored them
        if cache.missing(keys):
            self._score_batch(batch, cache)
            cache.flush()
        return self._format.unpack(cache.read(keys, batch.positions.device), self._vocab)

    def _open_cache(self) -> ScoreCache:
        """The cache, opened at the first use: with `top_k` its folder depends on the vocabulary size."""
        assert self._device is not None, "setup comes first"
        if self._format is None:
            self._format = TopKFormat(self.k, self._vocab)
        if self._cache is None:
            settings = {"teacher": self._metadata.fingerprint, **self._format.settings}
            self._cache = ScoreCache(self._root / self._format.name, self._format.columns, settings, distributed.rank())
        return self._cache

    def tokenizer(self) -> Tokenizer:
        """The teacher's tokenizer."""
        tokenizer: Tokenizer = self.teacher.tokenizer()
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self._vocab

    def limit_vocab(self, size: int) -> None:
        """Cuts the scores to the first `size` tokens; `top_k` then stores the most likely of these.

        Raises:
            ConfigError: If `k` is not below `size`.
        """
        self._check_k(size)
        self._vocab = min(self._vocab, size)
        if self.keep == "top_k":
            self._format = self._cache = None

    def _check_k(self, size: int) -> None:
        if self.keep == "top_k" and self.k >= size:
            raise ConfigError(f"CachedTeacher.k must be below the {size} tokens of the vocabulary, got {self.k}.")

    @property
    def display_name(self) -> str:
        """Name of the teacher that is cached."""
        return self.teacher.display_name

    def identity(self) -> str | None:
        """Identity of the teacher whose scores are cached."""
        return self.teacher.identity()

    def fingerprint(self) -> str | None:
        """The fingerprint of the teacher's weights, from the folder; None before `setup`."""
        return self._metadata.fingerprint

    @property
    def model(self) -> nn.Module | None:
        """The teacher's model, loaded if necessary."""
        if self._device is not None:
            self._load()
        return self.teacher.model

    @property
    def unloads_between_rounds(self) -> bool:
        """True if the constructor's `unload` is."""
        return self.unloads

    @property
    def scoring_module(self) -> nn.Module | None:
        """The head if hidden states are cached, otherwise None; the model is not loaded."""
        return self._format.head.module if isinstance(self._format, HiddenFormat) else None


def _batches(rows: Sequence[Row], limit: int) -> Iterator[list[Row]]:
    """Batches of rows of similar length, shortest first: at most `limit` tokens with padding, or a single row."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: (len(row.input_ids), row.key)):
        if batch and (len(batch) + 1) * len(row.input_ids) > limit:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
