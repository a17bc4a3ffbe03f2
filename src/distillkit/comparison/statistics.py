"""Statistics of a comparison: means over seeds and bootstrap intervals of paired differences."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
COVERAGE = 0.95

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """The difference of a metric between two methods on the same prompts and seeds.

    Args:
        mean: Difference of the two weighted means.
        low: Lower end of the bootstrap interval.
        high: Upper end of the bootstrap interval.
    """

    mean: float
    low: float
    high: float

    @property
    def is_sure(self) -> bool:
        """True if the interval excludes 0."""
        return self.low > 0 or self.high < 0


def mean_and_deviation(values: Array) -> tuple[float, float]:
    """The mean of `[S]` values and their standard deviation, with S − 1 in the denominator; NaN for one value."""
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else float("nan")


def paired_difference(method: Array, baseline: Array, weights: Array, resamples: int = RESAMPLES) -> Difference:
    """The difference of two weighted means over prompts, with a percentile bootstrap interval (Efron 1979).

    Prompts are resampled with replacement, and so are seeds if there are several. Each resample uses the same prompts
    and seeds for both methods. The random numbers depend on the shapes only, so equal metrics give equal intervals.

    Args:
        method: `[S, P]` metric of each seed and prompt.
        baseline: `[S, P]` metric of the method that is subtracted.
        weights: `[P]` weight of each prompt, such as its number of tokens; the metric of a seed is the weighted mean.
        resamples: Number of bootstrap samples.
    """
    weighted = (method - baseline) * weights  # [S, P]
    seeds, prompts = weighted.shape
    rng = np.random.default_rng(0)
    values = np.empty(resamples)
    step = max(1, 4_000_000 // prompts)  # bounds the memory of the einsum
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        # How often each prompt and each seed occurs in a resample: [b, P] and [b, S].
        prompt_counts = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=count)
        seed_counts = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=count)
        sums = np.einsum("bs,sp,bp->b", seed_counts, weighted, prompt_counts, optimize=True)
        values[start : start + count] = sums / (seeds * (prompt_counts @ weights))
    tail = 100 * (1 - COVERAGE) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return Difference(float(weighted.sum() / (seeds * weights.sum())), float(low), float(high))
