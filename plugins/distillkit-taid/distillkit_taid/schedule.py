"""The interpolation schedule of TAID, from the student to the teacher."""

from collections.abc import Mapping

import torch
from torch import Tensor

from distillkit.errors import ConfigError, check_range
from distillkit.interfaces import Schedule
from distillkit.types import Progress, Summary


class Interpolation(Schedule):
    """t of TAID: never below a straight line over the steps, and above it while the loss falls.

    After each optimizer step s of S, t ← min(t_end, max(t_start + (t_end − t_start)·s/S, t + α·sigmoid(m)·(1 − t)))
    with m ← β·m + (1−β)·δ, where δ is the relative decrease of the loss since the previous step. Its buffers are part
    of the checkpoint.

    Shing et al. 2025, arXiv 2501.16937, algorithm 1.

    Args:
        start: t_start in [0, 1), the initial t.
        end: t_end in (start, 1], the final t.
        alpha: α in [0, 1], size of the adaptive steps above the line.
        beta: β in [0, 1), momentum of the relative decreases of the loss.

    Raises:
        ConfigError: If a value is outside its range.
    """

    t: Tensor
    loss: Tensor
    momentum: Tensor

    def __init__(self, start: float = 0.4, end: float = 1.0, alpha: float = 5e-4, beta: float = 0.99) -> None:
        super().__init__()
        if not 0 <= start < end <= 1:
            raise ConfigError(f"Interpolation needs 0 <= start < end <= 1, got start {start} and end {end}.")
        check_range("Interpolation.alpha", alpha, 0, 1)
        check_range("Interpolation.beta", beta, 0, 1, closed="left")
        self.start, self.end, self.alpha, self.beta = start, end, alpha, beta
        self.register_buffer("t", torch.tensor(start, dtype=torch.float64))
        self.register_buffer("loss", torch.tensor(torch.inf, dtype=torch.float64))
        self.register_buffer("momentum", torch.zeros((), dtype=torch.float64))

    @property
    def value(self) -> Tensor:
        """t: 0-dim."""
        return self.t

    def update(self, progress: Progress, metrics: Mapping[str, Summary]) -> None:
        """Updates t; `metrics["divergence"]` is the loss of the step that has just ended."""
        line = self.start + (self.end - self.start) * progress.fraction
        adapted = self.t
        if "divergence" in metrics:
            loss = metrics["divergence"].mean.to(self.loss)
            fall = torch.nan_to_num((self.loss - loss) / (self.loss + 1e-15))  # 0 after the first step
            has_previous = self.loss.isfinite()
            momentum = torch.where(has_previous, self.beta * self.momentum + (1.0 - self.beta) * fall, self.momentum)
            step = self.alpha * torch.sigmoid(momentum) * (1.0 - self.t)
            adapted = torch.where(has_previous, self.t + step, self.t)
            self.momentum.copy_(momentum)
            self.loss.copy_(loss)
        self.t.copy_(adapted.clamp_min(line).clamp_max(self.end))
