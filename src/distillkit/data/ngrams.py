"""Runs of n words or tokens: what two texts share, and how much a text repeats itself."""

import re
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence

_WORD = re.compile(r"\w+")


def words(text: str) -> tuple[str, ...]:
    """The words of a text in lower case, without punctuation."""
    return tuple(_WORD.findall(text.casefold()))


def ngrams(items: Sequence[Hashable], n: int) -> Iterator[tuple[Hashable, ...]]:
    """Every run of `n` items, from left to right."""
    return (tuple(items[start : start + n]) for start in range(len(items) - n + 1))


def repetition(items: Sequence[Hashable], n: int, window: int) -> float:
    """The largest share of repeated n-grams in any stretch of a sequence.

    In a stretch the share is 1 − (different n-grams) / (n-grams), seq-rep-n of Welleck et al. 2019, arXiv 1908.04319.
    The stretches keep a loop at the end of a long text from being outweighed by what comes before.

    Args:
        items: Words or tokens.
        n: Items of an n-gram, at least 1.
        window: N-grams of a stretch, at least 1; a shorter sequence is one stretch.

    Returns:
        A number in [0, 1); 0 for a sequence without an n-gram.
    """
    runs = list(ngrams(items, n))
    size = min(window, len(runs))
    if size == 0:
        return 0.0
    counts = Counter(runs[:size])
    fewest = len(counts)
    for entering, leaving in zip(runs[size:], runs[: len(runs) - size], strict=True):
        counts[entering] += 1
        counts[leaving] -= 1
        if counts[leaving] == 0:
            del counts[leaving]
        fewest = min(fewest, len(counts))
    return 1.0 - fewest / size
