"""A loss: a divergence between teacher and student at each response position."""

import torch
from distillkit import TokenLoss
from distillkit.errors import ConfigError
from distillkit.types import Reduction
from torch import Tensor


class MyPlugin(TokenLoss):
    """Rényi divergence of order α, log Σ p^α q^(1−α) / (α − 1), with p the teacher and q the student.

    It is 0 at p = q. It tends to KL(p‖q) as α → 1; at α = ½ it is −2 log of the Bhattacharyya coefficient Σ √(p·q).

    Args:
        alpha: Order α in (0, 1), the exponent of the teacher's probabilities.
        reduction: Weighting of positions, `sequence_mean` or `token_mean`.
        temperature: Divisor τ > 0 of both models' logits before the softmax.
        rescale: Whether to multiply the loss by τ².

    Raises:
        ConfigError: If `alpha` is outside (0, 1).
    """

    def __init__(
        self,
        alpha: float = 0.5,
        reduction: Reduction = "sequence_mean",
        temperature: float = 1.0,
        rescale: bool = False,
    ) -> None:
        super().__init__(reduction, temperature, rescale)
        if not 0 < alpha < 1:
            raise ConfigError(f"MyPlugin.alpha must lie strictly between 0 and 1, got {alpha}.")
        self.alpha = alpha

    def divergence(self, logp: Tensor, logq: Tensor) -> Tensor:
        """Maps `[n, V]` log-probabilities of teacher and student to `[n]` nats."""
        return torch.logsumexp(self.alpha * logp + (1.0 - self.alpha) * logq, dim=-1) / (self.alpha - 1.0)
