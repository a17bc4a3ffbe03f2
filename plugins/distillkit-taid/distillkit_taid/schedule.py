"""How far the target has gone from the student to the teacher."""

from collections.abc import Mapping

import torch
from torch import Tensor

from distillkit.errors import ConfigError
from distillkit.interfaces import Schedule
from distillkit.types import Progress, Summary


class Interpolation(Schedule):
    """t of TAID: it never falls behind a straight line, and runs ahead of it while the loss falls.

    After each optimizer step s of S, t ← min(t_end, max(t_start + (t_end − t_start)·s/S, t + α·sigmoid(m)·(1 − t)))
    with m ← β·m + (1−β)·δ, and δ the share by which the loss fell since the step before. Its buffers are part of the
    checkpoint.

    Shing et al. 2025, arXiv 2501.16937, algorithm 1.

    Args:
        start: t_start in [0, 1).
        end: t_end in (start, 1].
        alpha: α in [0, 1], how far it runs ahead.
        beta: β in [0, 1), how long falls of the loss are remembered.

    Raises:
        ConfigError: If a number is outside its range.
    """

    t: Tensor
    loss: Tensor
    momentum: Tensor

    def __init__(self, start: float = 0.4, end: float = 1.0, alpha: float = 5e-4, beta: float = 0.99) -> None:
        super().__init__()
        if not 0 <= start < end <= 1:
            raise ConfigError(f"Interpolation needs 0 <= start < end <= 1, got start {start} and end {end}.")
        if not 0 <= alpha <= 1:
            raise ConfigError(f"Interpolation.alpha must lie in [0, 1], got {alpha}.")
        if not 0 <= beta < 1:
            raise ConfigError(f"Interpolation.beta must lie in [0, 1), got {beta}.")
        self.start, self.end, self.alpha, self.beta = start, end, alpha, beta
        self.register_buffer("t", torch.tensor(start, dtype=torch.float64))
        self.register_buffer("loss", torch.tensor(torch.inf, dtype=torch.float64))
        self.register_buffer("momentum", torch.zeros((), dtype=torch.float64))

    @property
    def value(self) -> Tensor:
        """t: 0-dim."""
        return self.t

    def update(self, progress: Progress, metrics: Mapping[str, Summary]) -> None:
        """Moves to `progress`; `metrics["divergence"]` is the loss of the step that ended."""
        line = self.start + (self.end - self.start) * progress.fraction
        ahead = self.t
        if "divergence" in metrics:
            found = metrics["divergence"].mean.to(self.loss)
            fall = torch.nan_to_num((self.loss - found) / (self.loss + 1e-15))  # 0 after the first step
            seen = self.loss.isfinite()
            momentum = torch.where(seen, self.beta * self.momentum + (1.0 - self.beta) * fall, self.momentum)
            step = self.alpha * torch.sigmoid(momentum) * (1.0 - self.t)
            ahead = torch.where(seen, self.t + step, self.t)
            self.momentum.copy_(momentum)
            self.loss.copy_(found)
        self.t.copy_(ahead.clamp_min(line).clamp_max(self.end))
