"""Decontamination: removal of training prompts that overlap with an evaluation set."""

import logging
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from distillkit.data.ngrams import ngrams
from distillkit.data.records import SourceSetting, log_left_out
from distillkit.data.word_tokens import words
from distillkit.errors import ConfigError, DataError, check_range
from distillkit.types import Record

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decontamination:
    """Leaves out training prompts that share an n-gram of words with an evaluation prompt.

    The user's turns are compared in lower case and without punctuation. A turn with fewer words must match completely.
    In scripts written without spaces, such as Chinese and Thai, each character is a word.
    Brown et al. 2020 (GPT-3), arXiv 2005.14165, appendix C, with 13 words.

    Args:
        against: Evaluation sets to compare with, besides `data.val` and `data.test`, which always are.
        ngram: Words per n-gram, at least 1.

    Raises:
        ConfigError: If `ngram` is below 1.
    """

    against: list[SourceSetting] = field(default_factory=list)
    ngram: int = 13

    def __post_init__(self) -> None:
        check_range("Decontamination.ngram", self.ngram, 1)


def without_overlap(
    records: Iterable[Record], held_out: Mapping[str, Iterable[Record]], ngram: int = 13
) -> list[Record]:
    """Returns the records whose prompts share no n-gram with a held-out one, and logs how many were left out.

    Args:
        records: Training records.
        held_out: Records to compare with, by their name in messages.
        ngram: Words per n-gram.

    Raises:
        ConfigError: If there is nothing to compare with.
        DataError: If every record is left out.
    """
    if not held_out:
        raise ConfigError("`data.decontaminate` has nothing to compare with: give data.val, data.test or `against`.")
    held_out_records = [record for split in held_out.values() for record in split]
    origins = {run: record.origin for record in held_out_records for run in _word_ngrams(record, ngram)}
    clean: list[Record] = []
    left_out: list[tuple[Record, str]] = []
    for record in records:
        match = next((origins[run] for run in _word_ngrams(record, ngram) if run in origins), None)
        if match is None:
            clean.append(record)
        else:
            left_out.append((record, match))
    total = len(clean) + len(left_out)
    summary = (
        f"{len(left_out)} of {total} training records share a run of {ngram} words, or a shorter turn, with a prompt "
        f"of {', '.join(held_out)}"
    )
    if not clean:
        raise DataError(f"data.decontaminate: {summary}; none is left: evaluate on other prompts, or leave it out.")
    _log.info("data.decontaminate: %s; they are left out", summary)
    matches = [f"{record.origin} shares words with {origin}" for record, origin in left_out]
    log_left_out("data.decontaminate", matches, total)
    return clean


def _word_ngrams(record: Record, n: int) -> Iterator[tuple[Hashable, ...]]:
    """Every n-gram of words of each user turn, or the complete turn if it has fewer words."""
    for message in record.messages:
        if message["role"] == "user":
            turn = words(message["content"])
            if turn:
                yield from ngrams(turn, min(n, len(turn)))
