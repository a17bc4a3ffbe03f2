"""Adaptive skew: an α per row that grows with the difficulty of the row (DistiLLM-2)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from distillkit.errors import ConfigError, check_range
from distillkit.interfaces import Schedule
from distillkit.types import Progress, Summary


class AdaptiveAlpha(Schedule):
    """Skew α of each row, computed from the gap g between the two models' likelihoods of its response.

    α = clip(1 − (1 − α₀)·m / g, α_min, α_max). The gap g is the length-normalised likelihood of the response under the
    model that generated it minus that under the other model. The reference gap m is the mean of g over the first
    `warmup_steps` optimizer steps that have such rows, with each row of each rank counted once; during these steps
    α = α₀. A hard row (large g) gets a large α, an easy row a small α, and g ≤ 0 gets α_min. α carries no gradient.
    The buffers that hold m are part of the checkpoint.

    Ko et al. 2025 (DistiLLM-2), arXiv 2503.07067, section 3.3.

    Args:
        initial: α₀ in [0, 1), used until the reference gap is complete.
        min: α_min, smallest skew, in [0, 1).
        max: α_max, largest skew, in [min, 1).
        warmup_steps: Number of optimizer steps over which the reference gap is averaged, at least 1.

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
        check_range("AdaptiveAlpha.initial", initial, 0, 1, closed="left")
        check_range("AdaptiveAlpha.warmup_steps", warmup_steps, 1)
        self.min, self.max, self.warmup_steps = min, max, warmup_steps
        self.register_buffer("_initial", torch.tensor(initial, dtype=torch.float32))
        self.register_buffer("gap_sum", torch.zeros((), dtype=torch.float64))
        self.register_buffer("gap_count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @property
    def value(self) -> Tensor:
        """α₀, 0-dim. `for_rows` returns the value of each row."""
        return self._initial

    @property
    def reference_gap(self) -> Tensor:
        """Mean gap m over the warm-up so far, 0-dim; 0 before the first step."""
        return self.gap_sum / self.gap_count.clamp_min(1.0)

    def metrics(self) -> Mapping[str, Tensor]:
        """The reference gap, which is still growing during the warm-up."""
        return {"reference_gap": self.reference_gap.clone()}

    def update(self, progress: Progress, metrics: Mapping[str, Summary]) -> None:
        """Adds the step's mean gap, `metrics["gap"]`, to the reference gap during the warm-up."""
        gap = metrics.get("gap")
        if gap is None:
            return
        count = gap.count.to(self.gap_count)
        has_rows = count > 0  # a step without rows does not count, and its mean may be NaN
        warming = has_rows & (self.steps < self.warmup_steps)
        self.gap_sum += torch.where(warming, gap.mean.to(self.gap_sum) * count, 0.0)
        self.gap_count += torch.where(warming, count, 0.0)
        self.steps += has_rows

    def for_rows(self, gap: Tensor) -> Tensor:
        """Returns α of each row.

        Args:
            gap: `[R]` gap g of each row, in [-1, 1].

        Returns:
            `[R]` skews in [min, max], or α₀ during the warm-up, without gradient.
        """
        gap = gap.detach()
        positive = gap > 0
        # Where g ≤ 0 the quotient is meaningless: divide by 1 instead, and replace the result below.
        quotient = self.reference_gap.to(gap) / torch.where(positive, gap, torch.ones_like(gap))
        alpha = (1.0 - (1.0 - self._initial.to(gap)) * quotient).clamp(self.min, self.max)
        alpha = torch.where(positive, alpha, torch.full_like(alpha, self.min))
        return torch.where(self.steps < self.warmup_steps, self._initial.to(gap), alpha)
