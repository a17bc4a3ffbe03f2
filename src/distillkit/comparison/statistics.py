"""Means over seeds, and intervals of paired differences."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
COVERAGE = 0.95

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """How much a method's figure differs from another's on the same prompts and seeds.

    Args:
        mean: The difference.
        low: Lower end of the bootstrap interval.
        high: Upper end.
    """

    mean: float
    low: float
    high: float

    @property
    def is_sure(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def mean_and_deviation(values: Array) -> tuple[float, float]:
    """The mean of `[S]` values, and their standard deviation with S − 1 in the denominator; NaN for one value."""
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else float("nan")


def paired_difference(method: Array, other: Array, weights: Array, resamples: int = RESAMPLES) -> Difference:
    """The difference of two weighted means over prompts, with a percentile bootstrap interval (Efron 1979).

    Prompts are drawn with replacement, and so are seeds where there are several: a draw has the same prompts and seeds
    of both methods. The draws depend on the shapes alone, so that the same figures have the same interval again.

    Args:
        method: `[S, P]` a figure of each seed and prompt.
        other: `[S, P]` that of the other method.
        weights: `[P]` weight of each prompt, such as its number of tokens; the figure of a seed is the weighted mean.
        resamples: Number of draws.
    """
    weighted = (method - other) * weights  # [S, P]
    seeds, prompts = weighted.shape
    draw = np.random.default_rng(0)
    values = np.empty(resamples)
    step = max(1, 4_000_000 // prompts)  # numbers at once
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        of_prompt = draw.multinomial(
            prompts, np.full(prompts, 1 / prompts), size=count
        )  # [b, P] times that it is drawn
        of_seed = draw.multinomial(seeds, np.full(seeds, 1 / seeds), size=count)  # [b, S]
        sums = np.einsum("bs,sp,bp->b", of_seed, weighted, of_prompt, optimize=True)
        values[start : start + count] = sums / (seeds * (of_prompt @ weights))
    tail = 100 * (1 - COVERAGE) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return Difference(float(weighted.sum() / (seeds * weights.sum())), float(low), float(high))
