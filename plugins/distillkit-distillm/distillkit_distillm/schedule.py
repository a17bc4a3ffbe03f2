"""The share of on-policy responses in DistiLLM's training data."""

from collections.abc import Mapping

import torch
from torch import Tensor

from distillkit.errors import check_range
from distillkit.interfaces import Schedule
from distillkit.types import Progress, Summary


class OffPolicyThreshold(Schedule):
    """φ of DistiLLM: the share of the student's own responses, which grows each time the validation loss rises.

    If a validation loss exceeds the previous one by more than ε, φ ← min(φ + step, 1). The first validation, before
    training, only sets the reference. φ and the loss are part of the checkpoint.

    Ko et al. 2024, arXiv 2402.03898, section 3.2 and algorithm 1.

    Args:
        start: Initial φ, in [0, 1].
        rise: ε ≥ 0, the largest rise of the loss, in its units, for which φ does not change.
        step: Increment of φ, above 0.
        figure: Validation metric that is compared: `nll` or `kl`, in nats per token.
        renew: Whether each loss is compared with that of the previous validation; False compares with the last
            validation after which φ grew, as the authors' code does.

    Raises:
        ConfigError: If a value is outside its range.
    """

    phi: Tensor
    loss: Tensor

    def __init__(
        self, start: float = 0.0, rise: float = 0.1, step: float = 0.1, figure: str = "nll", renew: bool = True
    ) -> None:
        super().__init__()
        check_range("OffPolicyThreshold.start", start, 0, 1)
        check_range("OffPolicyThreshold.rise", rise, 0)
        check_range("OffPolicyThreshold.step", step, 0, closed="neither")
        self.rise, self.step, self.figure, self.renew = rise, step, figure, renew
        self.register_buffer("phi", torch.tensor(start, dtype=torch.float64))
        self.register_buffer("loss", torch.tensor(torch.inf, dtype=torch.float64))

    @property
    def value(self) -> Tensor:
        """φ: 0-dim."""
        return self.phi

    def update(self, progress: Progress, metrics: Mapping[str, Summary]) -> None:
        """Updates φ after a validation, whose metrics have names that begin with `val/`; ignores other calls."""
        summary = metrics.get(f"val/{self.figure}")
        if summary is None:
            return
        loss = summary.mean.to(self.loss)
        first, grows = self.loss.isinf(), loss > self.loss + self.rise
        self.phi.copy_(torch.where(grows, self.phi + self.step, self.phi).clamp_max(1.0))
        self.loss.copy_(torch.where(first | grows | self.renew, loss, self.loss))
