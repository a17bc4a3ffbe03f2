"""A loss that is no number from some step on."""

import math
from collections.abc import Mapping

from torch import Tensor

from distillkit.losses import ForwardKL
from distillkit.types import Progress, Summary


class Diverging(ForwardKL):
    """KL(p‖q), and NaN once `step` optimizer steps were taken."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step, self.taken = step, 0

    def update(self, progress: Progress, metrics: Mapping[str, Summary]) -> None:
        self.taken = progress.step

    def divergence(self, logp: Tensor, logq: Tensor) -> Tensor:
        return super().divergence(logp, logq) * (math.nan if self.taken >= self.step else 1.0)

    def gradient(self, logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
        loss, gradient = super().gradient(logp, logq)
        return loss * (math.nan if self.taken >= self.step else 1.0), gradient
