"""Means over the processes of a run."""

import math
from collections.abc import Sequence

from distillkit.devices.distributed import sum_over_ranks


class Means:
    """Sums and counts by name, as Python floats: no precision setting of a run reaches them."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, name: str, values: Sequence[float], count: int) -> None:
        """Adds to a mean.

        Args:
            name: Name of the mean.
            values: Addends of the sum. NaN makes the mean NaN.
            count: Number of units that they stand for; 0 on a process that has none, which takes part in `reduce`.
        """
        total, total_count = self._sums.get(name, (0.0, 0))
        self._sums[name] = total + sum(values), total_count + count

    def reduce(self) -> dict[str, float]:
        """Returns each mean over all ranks; NaN without units. Every rank must call this, with the same names."""
        names = sorted(self._sums)
        totals = sum_over_ranks([number for name in names for number in self._sums[name]])
        pairs = zip(totals[0::2], totals[1::2], strict=True)
        return {name: total / count if count else math.nan for name, (total, count) in zip(names, pairs, strict=True)}
