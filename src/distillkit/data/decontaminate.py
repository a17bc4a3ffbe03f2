"""Training prompts that share words with an evaluation set."""

import logging
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from distillkit.data.ngrams import ngrams, words
from distillkit.data.records import Record, Source
from distillkit.errors import ConfigError, DataError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decontamination:
    """Leaves out training prompts that share a run of words with an evaluation prompt.

    Compared are the user's turns, in lower case and without punctuation. A turn of fewer words is compared as a whole.
    Brown et al. 2020 (GPT-3), arXiv 2005.14165, appendix C, with 13 words.

    Args:
        against: Evaluation sets to compare with, besides `data.val` and `data.test`, which always are.
        ngram: Words of a run, at least 1.

    Raises:
        ConfigError: If `ngram` is below 1.
    """

    against: list[str | Source] = field(default_factory=list)
    ngram: int = 13

    def __post_init__(self) -> None:
        if self.ngram < 1:
            raise ConfigError(f"Decontamination.ngram must be at least 1, got {self.ngram}.")


def without_overlap(
    records: Iterable[Record], held_out: Mapping[str, Iterable[Record]], ngram: int = 13
) -> list[Record]:
    """The records whose prompts share no run of `ngram` words with a held-out one; how many do is logged.

    Args:
        records: Training records.
        held_out: Records to compare with, by a name for messages.
        ngram: Words of a run.

    Raises:
        ConfigError: If there is nothing to compare with.
        DataError: If every record is left out.
    """
    if not held_out:
        raise ConfigError("`data.decontaminate` has nothing to compare with: give data.val, data.test or `against`.")
    known = {run: record.origin for each in held_out.values() for record in each for run in _runs(record, ngram)}
    kept: list[Record] = []
    left_out: list[tuple[Record, str]] = []
    for record in records:
        match = next((known[run] for run in _runs(record, ngram) if run in known), None)
        if match is None:
            kept.append(record)
        else:
            left_out.append((record, match))
    total = len(kept) + len(left_out)
    first = f"; the first, {left_out[0][0].origin}, with {left_out[0][1]}" if left_out else ""
    told = (
        f"{len(left_out)} of {total} training records share a run of {ngram} words, or a shorter turn, with a prompt "
        f"of {', '.join(held_out)}{first}"
    )
    if not kept:
        raise DataError(f"data.decontaminate: {told}; none is left: evaluate on other prompts, or leave it out.")
    _log.info("data.decontaminate: %s; they are left out", told)
    return kept


def _runs(record: Record, n: int) -> Iterator[tuple[Hashable, ...]]:
    """Every run of n words of each user turn, or the whole turn if it has fewer."""
    for message in record.messages:
        if message["role"] == "user":
            found = words(message["content"])
            if found:
                yield from ngrams(found, min(n, len(found)))
