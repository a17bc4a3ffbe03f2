"""How often the student's own responses are trained on."""

from collections.abc import Mapping

import torch
from torch import Tensor

from distillkit.errors import ConfigError
from distillkit.interfaces import Schedule
from distillkit.types import Progress, Summary


class OffPolicyThreshold(Schedule):
    """φ of DistiLLM: a share of the student's own responses that grows each time the validation's loss does.

    After a validation whose loss is above the one before by more than ε, φ ← min(φ + step, 1). The first validation,
    before training, is only compared with. φ and the loss are part of the checkpoint.

    Ko et al. 2024, arXiv 2402.03898, section 3.2 and algorithm 1.

    Args:
        start: φ at first, in [0, 1].
        rise: ε ≥ 0, the rise of the loss, in its units, up to which φ stays.
        step: What φ grows by, above 0.
        figure: The validation's figure that is compared: `nll` or `kl`, nats per token.
        renew: Whether each loss is compared with that of the validation before it; False compares with that of the last
            validation after which φ grew, as the authors' code does.

    Raises:
        ConfigError: If a number is outside its range.
    """

    phi: Tensor
    loss: Tensor

    def __init__(
        self, start: float = 0.0, rise: float = 0.1, step: float = 0.1, figure: str = "nll", renew: bool = True
    ) -> None:
        super().__init__()
        if not 0 <= start <= 1:
            raise ConfigError(f"OffPolicyThreshold.start must lie in [0, 1], got {start}.")
        if not rise >= 0:
            raise ConfigError(f"OffPolicyThreshold.rise must not be below 0, got {rise}.")
        if not step > 0:
            raise ConfigError(f"OffPolicyThreshold.step must be above 0, got {step}.")
        self.rise, self.step, self.figure, self.renew = rise, step, figure, renew
        self.register_buffer("phi", torch.tensor(start, dtype=torch.float64))
        self.register_buffer("loss", torch.tensor(torch.inf, dtype=torch.float64))

    @property
    def value(self) -> Tensor:
        """φ: 0-dim."""
        return self.phi

    def update(self, progress: Progress, metrics: Mapping[str, Summary]) -> None:
        """Moves after a validation, whose figures are in `metrics` with `val/` before their names."""
        found = metrics.get(f"val/{self.figure}")
        if found is None:
            return
        loss = found.mean.to(self.loss)
        first, grows = self.loss.isinf(), loss > self.loss + self.rise
        self.phi.copy_(torch.where(grows, self.phi + self.step, self.phi).clamp_max(1.0))
        self.loss.copy_(torch.where(first | grows | self.renew, loss, self.loss))
