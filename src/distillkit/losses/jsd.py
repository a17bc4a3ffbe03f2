"""Generalized Jensen-Shannon divergence as a loss."""

from torch import Tensor

from distillkit import divergences
from distillkit.errors import ConfigError
from distillkit.losses.token import TokenLoss
from distillkit.types import Reduction


class GeneralizedJSD(TokenLoss):
    """Generalized Jensen-Shannon divergence, b·KL(p‖m) + (1−b)·KL(q‖m) with m = b·p + (1−b)·q.

    Agarwal et al. 2023 (GKD), arXiv 2306.13649, equation 1. β is the teacher's share of the mixture. The loss vanishes
    at both ends: near β = 0 it is β·KL(p‖q), near β = 1 it is (1−β)·KL(q‖p).

    Args:
        beta: b in (0, 1), the teacher's share of the mixture.
        reduction: Weighting of positions: `sequence_mean` or `token_mean`.
        temperature: τ > 0, divides both models' logits before the softmax.
        rescale: Whether the loss is multiplied by τ².

    Raises:
        ConfigError: If `beta` is outside (0, 1).
    """

    def __init__(
        self,
        beta: float = 0.5,
        reduction: Reduction = "sequence_mean",
        temperature: float = 1.0,
        rescale: bool = False,
    ) -> None:
        super().__init__(reduction, temperature, rescale)
        if not 0 < beta < 1:
            raise ConfigError(
                f"GeneralizedJSD.beta must lie strictly between 0 and 1, got {beta}. "
                "At the ends it vanishes: use ForwardKL or ReverseKL there."
            )
        self.beta = beta

    def divergence(self, logp: Tensor, logq: Tensor) -> Tensor:
        """Returns `divergences.jsd`."""
        return divergences.jsd(logp, logq, self.beta)

    def gradient(self, logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
        """Returns `divergences.jsd_and_grad`."""
        return divergences.jsd_and_grad(logp, logq, self.beta)
