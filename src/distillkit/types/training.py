"""Loss outputs, metric summaries, and training progress.

Letters: C components of a loss.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Reduction = Literal["sequence_mean", "token_mean"]


@dataclass(frozen=True)
class LossOutput:
    """Sum and count of a loss, before any mean is taken.

    Args:
        total: `[]` or `[C]` nats summed over units, one sum per component.
        units: `[]` or `[C]` float64 number of units of each component, the divisor of the mean over the global batch.
        metrics: Detached values: a scalar, or one per row or position. The names must not depend on the batch.
    """

    total: Tensor
    units: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """Statistics of a metric over one optimizer step and all ranks, 0-dim tensors."""

    mean: Tensor
    min: Tensor
    max: Tensor
    count: Tensor


@dataclass(frozen=True)
class Progress:
    """Progress of training.

    Args:
        step: Completed optimizer steps.
        total: Optimizer steps of the whole run; an estimate at the current rate if a budget ends the run.
    """

    step: int
    total: float

    @property
    def fraction(self) -> float:
        """Completed share of the run, in [0, 1]."""
        return min(self.step / self.total, 1.0) if self.total > 0 else 0.0
