"""A skew per row that follows how hard the row is (DistiLLM-2)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from distillkit.errors import ConfigError
from distillkit.interfaces import Schedule
from distillkit.types import Progress, Summary


class AdaptiveAlpha(Schedule):
    """Skew α of each row from the gap g between the two models' likelihoods of its response.

    α = clip(1 − (1 − α₀)·m / g, α_min, α_max), where g is the length-normalised likelihood of the response under its
    writer's model minus that under the other, and m, the reference gap, is the mean of g over the first `warmup_steps`
    optimizer steps that have such rows, all rows of all ranks counted once; during them α = α₀. A hard row (large g)
    gets the large α, an easy one the small α; g ≤ 0 gets α_min. α carries no gradient. Its buffers hold m and are part
    of the checkpoint.

    Ko et al. 2025 (DistiLLM-2), arXiv 2503.07067, section 3.3.

    Args:
        initial: α₀ in [0, 1), used until the reference gap is known.
        min: α_min, smallest skew, in [0, 1).
        max: α_max, largest skew, in [min, 1).
        warmup_steps: Optimizer steps that the reference gap is the mean over, at least 1.

    Raises:
        ConfigError: If a value is outside its range.
    """

    gap_sum: Tensor
    gap_count: Tensor
    steps: Tensor
    _initial: Tensor

    def __init__(self, initial: float = 0.1, min: float = 0.01, max: float = 0.1, warmup_steps: int = 10) -> None:
        super().__init__()
        if not 0 <= min <= max < 1:
            raise ConfigError(f"AdaptiveAlpha needs 0 <= min <= max < 1, got min {min} and max {max}.")
        if not 0 <= initial < 1:
            raise ConfigError(f"AdaptiveAlpha.initial must lie in [0, 1), got {initial}.")
        if warmup_steps < 1:
            raise ConfigError(f"AdaptiveAlpha.warmup_steps must be at least 1, got {warmup_steps}.")
        self.min, self.max, self.warmup_steps = min, max, warmup_steps
        self.register_buffer("_initial", torch.tensor(initial, dtype=torch.float32))
        self.register_buffer("gap_sum", torch.zeros((), dtype=torch.float64))
        self.register_buffer("gap_count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @property
    def value(self) -> Tensor:
        """α₀: 0-dim. Rows have values of their own, see `for_rows`."""
        return self._initial

    @property
    def reference_gap(self) -> Tensor:
        """The mean gap m of the warm-up so far: 0-dim, 0 before the first step."""
        return self.gap_sum / self.gap_count.clamp_min(1.0)

    def update(self, progress: Progress, metrics: Mapping[str, Summary]) -> None:
        """Counts the step's mean gap, `metrics["gap"]`, into the reference while the warm-up lasts."""
        gap = metrics.get("gap")
        if gap is None:
            return
        count = gap.count.to(self.gap_count)
        has_rows = count > 0  # a step without rows counts for nothing, and its mean may be NaN
        warming = has_rows & (self.steps < self.warmup_steps)
        self.gap_sum += torch.where(warming, gap.mean.to(self.gap_sum) * count, 0.0)
        self.gap_count += torch.where(warming, count, 0.0)
        self.steps += has_rows

    def for_rows(self, gap: Tensor) -> Tensor:
        """α of each row.

        Args:
            gap: `[R]` gap g of each row, in [-1, 1].

        Returns:
            `[R]` skews in [min, max], or α₀ while the warm-up lasts, without gradient.
        """
        gap = gap.detach()
        positive = gap > 0
        # Where g ≤ 0 the quotient is meaningless: 1 stands in and the value is replaced.
        quotient = self.reference_gap.to(gap) / torch.where(positive, gap, torch.ones_like(gap))
        alpha = (1.0 - (1.0 - self._initial.to(gap)) * quotient).clamp(self.min, self.max)
        alpha = torch.where(positive, alpha, torch.full_like(alpha, self.min))
        return torch.where(self.steps < self.warmup_steps, self._initial.to(gap), alpha)
