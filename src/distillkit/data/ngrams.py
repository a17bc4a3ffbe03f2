"""N-grams of words or tokens, and the repetition within a sequence."""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence


def ngrams(items: Sequence[Hashable], n: int) -> Iterator[tuple[Hashable, ...]]:
    """Every n-gram of a sequence, from left to right."""
    return (tuple(items[start : start + n]) for start in range(len(items) - n + 1))


def repetition(items: Sequence[Hashable], n: int, window: int) -> float:
    """The largest fraction of repeated n-grams in any window of a sequence.

    In a window the fraction is 1 − (different n-grams) / (n-grams), seq-rep-n of Welleck et al. 2019, arXiv 1908.04319.
    With windows, a loop at the end of a long text is not averaged out by the text before it.

    Args:
        items: Words or tokens.
        n: Items per n-gram, at least 1.
        window: N-grams per window, at least 1; a shorter sequence is a single window.

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
